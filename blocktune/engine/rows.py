"""Maps the rows of a batch to the columns of its cache, and selects the rows to compute."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from blocktune.cache import SKIP
from blocktune.layout import GLOBAL, Kind, Layout, Rows
from blocktune.prompt import Batch


class Computed(NamedTuple):
    """Rows to compute, by order, padded on the left so that the last row is every prompt's last."""

    ids: Tensor  # token ids, ``(B, R)``
    rows: Rows  # their attributes, ``(B, R)``; all are in the group `GLOBAL`
    columns: Tensor  # their columns in the cache, `SKIP` for padding, ``(B, R)``
    index: Tensor  # their indices in the layout, ``(B, R)``

    def of(self, chosen: Tensor) -> Tensor:
        """Gathers a mask over the layout's rows ``(B, S)`` for the computed rows, ``(B, R)``."""
        return chosen.gather(1, self.index) & (self.rows.kind != Kind.PAD)

    def take(self, index: Tensor, exists: Tensor) -> Computed:
        """The rows at ``index`` ``(B, R')``, padding where ``exists`` is False."""
        rows = self.rows.map(lambda field: field.gather(1, index))
        columns = self.columns.gather(1, index).masked_fill(~exists, SKIP)
        rows = replace(rows, kind=rows.kind.masked_fill(~exists, Kind.PAD))
        return Computed(self.ids.gather(1, index), rows, columns, self.index.gather(1, index))


def computed_rows(batch: Batch, chosen: Tensor) -> Computed:
    """Gathers the ``chosen`` rows ``(B, S)`` of a batch for computing."""
    order, rows = batch.layout.order, batch.layout.rows()
    rows = replace(rows, group=torch.full_like(rows.group, GLOBAL))
    every = torch.arange(order.shape[1], device=order.device).expand_as(order)
    # A prompt's order counts its rows, without blanks, from 0. So it is the column.
    return Computed(batch.input_ids, rows, order, every).take(*left_padded(chosen, order))


def has_column(layout: Layout) -> Tensor:
    """Rows that the cache stores, ``(B, S)`` bool: all but blanks and padding."""
    return ~layout.is_pad & (layout.kind != Kind.BLANK)


def column_rows(layout: Layout) -> Rows:
    """Rows of the cache's columns, ``(B, N)``: all rows that are not blanks, by order."""
    stored = has_column(layout)
    width = layout.num_rows
    columns = torch.arange(width, device=layout.device).expand_as(layout.order)
    if torch.equal(layout.order, columns) and bool(stored.all()):
        return layout.rows()
    # The orders of a prompt's stored rows count from 0, so a scatter replaces sorting.
    place, count = torch.where(stored, layout.order, width), int(stored.sum(1).max())
    index = torch.zeros(len(place), width + 1, dtype=torch.int64, device=place.device)
    index = index.scatter(1, place, columns)[:, :count]
    rows = layout.rows().map(lambda field: field.gather(1, index))
    exists = torch.arange(count, device=layout.device) < stored.sum(1)[:, None]
    return replace(rows, kind=rows.kind.masked_fill(~exists, Kind.PAD))


def of_columns(scores: Tensor, layout: Layout) -> Tensor:
    """Gathers column scores ``(..., B, N)`` for the layout's rows ``(..., B, S)``; blanks: 0."""
    stored = has_column(layout)
    column = torch.where(stored, layout.order, 0).expand(*scores.shape[:-1], -1)
    return scores.gather(-1, column) * stored


def to_columns(rows: Tensor, layout: Layout, columns: Rows) -> Tensor:
    """Converts a mask of stored rows of the layout ``(B, S)`` to the ``columns`` ``(B, N)``."""
    mask = torch.zeros_like(columns.kind)
    return mask.scatter_reduce(1, layout.order * rows, rows.long(), "amax").bool()


def decoded_rows(last: Rows, steps: int) -> Rows:
    """Rows of the ``steps`` decoded tokens ``(B, steps)`` after the ``last`` rows ``(B, 1)``."""
    ahead = torch.arange(1, steps + 1, device=last.order.device)
    rows = last.map(lambda field: field.expand(-1, steps))
    return replace(
        rows,
        kind=torch.full_like(rows.kind, Kind.ANSWER),
        offset=(ahead - 1).expand_as(rows.offset),
        position=rows.position + ahead,
        order=rows.order + ahead,
    )


def left_padded(chosen: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the chosen rows by order, ``(B, R)``, and a mask that is False for padding."""
    count = chosen.sum(1)
    width = int(count.max())
    exists = torch.arange(width, device=chosen.device) >= width - count[:, None]
    index = torch.zeros_like(exists, dtype=torch.int64)
    prompt, row = chosen.nonzero(as_tuple=True)  # usually few: sort only these
    rank = (prompt * (order.max() + 1) + order[prompt, row]).argsort()
    index[exists] = row[rank]
    return index, exists


PER_ROW = ("position_embeddings", "position_ids")  # of a layer, with an item for each row


class RowSubset:
    """A subset ``chosen`` ``(B, U)`` of the candidate rows; the other fields are ``(B, R)``."""

    def __init__(self, candidates: Computed, chosen: Tensor):
        self._candidates, self.chosen = candidates, chosen
        self._all = torch.equal(chosen, candidates.rows.kind != Kind.PAD)
        self.index, self.exists = left_padded(chosen, candidates.rows.order)
        self.rows = candidates.take(self.index, self.exists)
        self._picked: dict[int, tuple[Any, Any]] = {}

    def of_candidates(self, chosen: Tensor) -> Tensor:
        """Converts a mask of these rows ``(B, R)`` to a mask of the candidates ``(B, U)``."""
        prompt, row = chosen.nonzero(as_tuple=True)
        mask = torch.zeros_like(self._candidates.rows.kind, dtype=torch.bool)
        mask[prompt, self.index[prompt, row]] = True
        return mask

    def put(self, hidden: Tensor, whole: Tensor) -> None:
        """Writes these rows' states ``(B, R, hidden)`` into the candidates' ``(B, U, hidden)``."""
        prompt, row = self.exists.nonzero(as_tuple=True)
        whole[prompt, self.index[prompt, row]] = hidden[prompt, row]

    def pick(self, whole: Tensor) -> Tensor:
        """Gathers these rows from ``(B, U, ...)``, or from ``(1, U, ...)`` for all prompts."""
        whole = whole.expand(len(self.index), *whole.shape[1:])
        return whole.gather(1, as_index(self.index, whole))

    def inputs(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """A layer's arguments after the hidden states; those with an item per candidate are cut."""
        if self._all:
            return args, kwargs
        count = self._candidates.rows.kind.shape[1]

        def of_rows(value: Any) -> bool:
            if isinstance(value, tuple):
                return bool(value) and all(map(of_rows, value))
            return isinstance(value, Tensor) and value.ndim > 2 and value.shape[1] == count

        own = {n: self._pick_once(kwargs[n]) for n in PER_ROW if kwargs.get(n) is not None}
        args = tuple(self._pick_once(value) if of_rows(value) else value for value in args)
        return args, kwargs | own

    def _pick_once(self, value: Tensor | tuple) -> Tensor | tuple:
        # All layers get the same tensors: pick each once (and hold it, so that its id is unique).
        if id(value) not in self._picked:
            parts = tuple(map(self.pick, value)) if isinstance(value, tuple) else self.pick(value)
            self._picked[id(value)] = (value, parts)
        return self._picked[id(value)][1]


def as_index(index: Tensor, rows: Tensor) -> Tensor:
    """``index`` ``(B, R)`` for gathering from ``rows`` ``(B, U, ...)``."""
    shape = (*index.shape, *rows.shape[2:])
    return index.view(*index.shape, *[1] * (rows.ndim - 2)).expand(shape)
