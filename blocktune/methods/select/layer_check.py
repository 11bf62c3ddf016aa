"""What a selector is shown when it is asked again on the way up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from torch import Tensor


class LayerKV(NamedTuple):
    """Keys and values of some rows in one layer, each ``(B, K, R, D)``."""

    keys: Tensor
    values: Tensor


@dataclass(frozen=True)
class LayerCheck:
    """A layer's entry, where rows can be dropped.

    Attributes:
        layer: 0-based.
        num_layers: Layers of the model.
        eligible: Computed rows that are context tokens, ``(B, R)`` bool.
        context_tokens: Of each prompt, ``(B,)``.
        prompt_tokens: Columns of each prompt, the question's and links' included, ``(B,)``.
        other_tokens: Rows of each prompt that are computed in every layer, ``(B,)``: the
            question, links, a prefix that is not cached.
        chunk: Of each row, ``(B, R)``; -1 for those of no chunk.
        question_mass: Attention that the question paid each chunk in the layers below, ``(B, C)``,
            where the selector watches chunks; else None.
        probe: Makes this layer's states of all rows. Costs its key and value projections, so
            it only runs when `fresh` or `cached` is read.
    """

    layer: int
    num_layers: int
    eligible: Tensor
    context_tokens: Tensor
    prompt_tokens: Tensor
    other_tokens: Tensor
    chunk: Tensor
    question_mass: Tensor | None
    probe: Callable[[], tuple[LayerKV, LayerKV]]

    @cached_property
    def _states(self) -> tuple[LayerKV, LayerKV]:
        return self.probe()

    @property
    def fresh(self) -> LayerKV:
        """The rows' states made now, in their prompt's context."""
        return self._states[0]

    @property
    def cached(self) -> LayerKV:
        """What the cache holds for the rows, relocated; arbitrary where not ``eligible``."""
        return self._states[1]
