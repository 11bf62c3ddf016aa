"""What a selector is shown at a check layer, where it may drop tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class LayerKV(NamedTuple):
    """Keys and values of some rows in one layer, each ``(B, K, R, D)``."""

    keys: Tensor
    values: Tensor


@dataclass(frozen=True)
class LayerCheck:
    """The entry of a layer, where rows can be dropped.

    Attributes:
        layer: 0-based.
        num_layers: Layers of the model.
        eligible: Computed rows that are context tokens, ``(B, R)`` bool.
        context_tokens: Of each prompt, ``(B,)``.
        cached_tokens: Of each prompt, a cached prefix included, ``(B,)``.
        chunk: Of each row, ``(B, R)``; -1 for rows of no chunk.
        question_mass: The question's attention to each chunk in the layers below, ``(B, C)``, if
            the selector watches chunks; else None.
        probe: Computes this layer's keys and values of all rows. It costs their projections, so it
            only runs when `fresh` or `cached` is read.
    """

    layer: int
    num_layers: int
    eligible: Tensor
    context_tokens: Tensor
    cached_tokens: Tensor
    chunk: Tensor
    question_mass: Tensor | None
    probe: Callable[[], tuple[LayerKV, LayerKV]]

    @cached_property
    def _states(self) -> tuple[LayerKV, LayerKV]:
        return self.probe()

    @property
    def fresh(self) -> LayerKV:
        """The rows' keys and values as computed now, in the context of their prompt."""
        return self._states[0]

    @property
    def cached(self) -> LayerKV:
        """The rows' keys and values in the cache, relocated; arbitrary where not ``eligible``."""
        return self._states[1]
