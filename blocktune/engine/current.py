"""The rows that a layer computes, among all that any layer of the forward pass will."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from blocktune.engine.rows import Computed, left_padded
from blocktune.layout import Kind

PER_ROW = ("position_embeddings", "position_ids")
"""What a model hands to each of its layers besides hidden states, made for the rows it embedded."""


class CurrentRows:
    """Some rows of a universe.

    Attributes:
        rows: Their facts, ids and columns, ``(B, R)``.
        exists: Which are no padding, ``(B, R)`` bool.
        index: Of each in the universe, ``(B, R)``.
    """

    def __init__(self, universe: Computed, chosen: Tensor | None = None):
        """Takes the ``chosen`` rows ``(B, U)`` of the universe; None: all."""
        self._universe, self._all = universe, chosen is None
        if chosen is None:
            self.rows, self.exists = universe, universe.rows.kind != Kind.PAD
            count = torch.arange(self.exists.shape[1], device=self.exists.device)
            self.index = count.expand_as(self.exists)
        else:
            self.index, self.exists = left_padded(chosen, universe.rows.order)
            self.rows = universe.take(self.index, self.exists)
        self._picked: dict[int, tuple[Any, Any]] = {}

    def of_universe(self, chosen: Tensor) -> Tensor:
        """Of these rows ``(B, R)`` bool those that are chosen, among the universe's ``(B, U)``."""
        prompt, row = chosen.nonzero(as_tuple=True)
        mask = torch.zeros_like(self._universe.rows.kind, dtype=torch.bool)
        mask[prompt, self.index[prompt, row]] = True
        return mask

    def put(self, hidden: Tensor, whole: Tensor) -> None:
        """Writes these rows' states ``(B, R, hidden)`` into the universe's ``(B, U, hidden)``."""
        prompt, row = self.exists.nonzero(as_tuple=True)
        whole[prompt, self.index[prompt, row]] = hidden[prompt, row]

    def pick(self, whole: Tensor) -> Tensor:
        """These rows of ``(B, U, ...)``, or of ``(1, U, ...)`` that is for all prompts."""
        whole = whole.expand(len(self.index), *whole.shape[1:])
        return whole.gather(1, as_index(self.index, whole))

    def arguments(self, kwargs: dict) -> dict:
        """A layer's keyword arguments, picked for these rows."""
        if self._all:
            return kwargs
        return kwargs | {
            name: self._pick_once(kwargs[name]) for name in PER_ROW if kwargs.get(name) is not None
        }

    def _pick_once(self, value: Tensor | tuple) -> Tensor | tuple:
        # Layers share these tensors: each is picked once (and held, so that ids stay unique).
        if id(value) not in self._picked:
            parts = tuple(map(self.pick, value)) if isinstance(value, tuple) else self.pick(value)
            self._picked[id(value)] = (value, parts)
        return self._picked[id(value)][1]


def as_index(index: Tensor, rows: Tensor) -> Tensor:
    """``index`` ``(B, R)`` for gathering from ``rows`` ``(B, U, ...)``."""
    shape = (*index.shape, *rows.shape[2:])
    return index.view(*index.shape, *[1] * (rows.ndim - 2)).expand(shape)
