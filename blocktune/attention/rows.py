"""Rows moved to other places, differentiably, where the gradient is a gather too."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor


class RowMap:
    """Where each target row comes from; a source row goes to one place at most.

    So the gradient is a gather as well. Autograd's gradient of ``index_select`` has to add, since
    it cannot know this, and took longer than attention itself.
    """

    def __init__(self, source: Tensor, num_sources: int):
        """Takes the source row of each target row, ``(T,)`` int64, negative for a row of zeros."""
        self._source = source
        self._num_sources = num_sources
        self._index = source.clamp(min=0)
        self._blank = (source < 0).nonzero().squeeze(1)
        self._start = int(source[0]) if len(source) else 0
        run = torch.arange(self._start, self._start + len(source), device=source.device)
        self._is_run = self._start >= 0 and torch.equal(source, run)

    @cached_property
    def back(self) -> RowMap:
        """The inverse map, with zeros for the source rows that were not moved."""
        real = (self._source >= 0).nonzero().squeeze(1)
        source = torch.full((self._num_sources,), -1, device=self._source.device)
        source[self._source[real]] = real
        return RowMap(source, len(self._source))

    def __call__(self, rows: Tensor) -> Tensor:
        """Moves ``rows`` ``(sources, ...)`` to ``(T, ...)``; a view if they are contiguous."""
        if self._is_run:
            return rows.narrow(0, self._start, len(self._source))
        moved = rows.index_select(0, self._index)
        return moved.index_fill_(0, self._blank, 0) if len(self._blank) else moved

    def add_back(self, total: Tensor, rows: Tensor) -> None:
        """Adds ``rows`` ``(T, ...)`` to their source rows in ``total`` ``(sources, ...)``."""
        if self._is_run:
            total.narrow(0, self._start, len(self._source)).add_(rows)
        else:
            total.add_(self.back(rows))


def move_rows(rows: Tensor, *maps: RowMap) -> tuple[Tensor, ...]:
    """Moves the same ``rows`` ``(sources, ...)`` by each map, differentiably."""
    return _Move.apply(rows, *maps)


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, *maps: RowMap) -> tuple[Tensor, ...]:
        ctx.maps = maps
        ctx.set_materialize_grads(False)
        return tuple(row_map(rows) for row_map in maps)

    @staticmethod
    def backward(ctx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        used = [pair for pair in zip(ctx.maps, grads, strict=True) if pair[1] is not None]
        total = None
        for row_map, grad in used:
            if total is not None:
                row_map.add_back(total, grad)
            else:
                total = row_map.back(grad)
                # The incoming gradient must not be changed.
                total = total.clone() if len(used) > 1 and total._is_view() else total
        return (total, *(None for _ in ctx.maps))
