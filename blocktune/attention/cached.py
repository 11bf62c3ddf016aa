"""Attention of the computed rows over a cache that holds all columns of the prompt."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from blocktune.attention.kernels import ROW_BLOCK as CAUSAL_BLOCK
from blocktune.attention.kernels import AttentionParams, tail_attention
from blocktune.attention.masks import KEPT_CELLS, MaskRoom, RowBand
from blocktune.layout import GLOBAL, Kind, LayerRule, Rows

ROW_BLOCK = 128  # few, because computed rows are far apart: a block spans many columns


class CachePlan:
    """The plan for serving: some rows are computed, the keys of the others are in the cache.

    A fresh row overwrites the column of its original before any row attends. So global rows may see
    all columns, and the rule applies only order, window and padding. ``executed`` has each layer
    that ran by it, with the window, the multiply-adds per score and the rows per causal block of
    each time that it attended (twice in DiffLlama).
    """

    def __init__(
        self,
        query: Rows,
        key: Rows,
        reshaping: Any = None,
        columns: Tensor | None = None,
        kept_cells: int = KEPT_CELLS,
    ):
        """Prepares rows ``query`` ``(B, R)`` over the columns ``key`` ``(B, N)``, both by order.

        ``reshaping``, a `ReshapedAttention` for all plans of a batch, changes scores of reused
        keys. ``columns`` ``(B, R)`` are those that the rows are written into, -1 for padding;
        None: a row's order.
        """
        self.query = query
        self.context_rows = (query.kind == Kind.CHUNK).sum(1)  # rows of chunk tokens, ``(B,)``
        self.executed: dict[int, list[tuple[int | None, int, int]]] = {}
        exists, stored = query.kind != Kind.PAD, key.kind != Kind.PAD
        self._reshaping = reshaping
        self.columns = query.order.masked_fill(~exists, -1) if columns is None else columns
        nothing = torch.zeros_like(key.kind)
        room = MaskRoom(kept_cells)
        self._band = RowBand(query, key, nothing, exists, stored, row_block=ROW_BLOCK, room=room)
        self._tails = find_tails(query, key)

    def attend(self, query, key, value, rule, params) -> Tensor:
        """Implements `Plan.attend`. The caller has left out rows that end before this layer."""
        macs = query.shape[1] * (query.shape[3] + value.shape[3])
        block = 1 if params.is_plain else CAUSAL_BLOCK
        self.executed.setdefault(rule.layer, []).append((rule.window, macs, block))
        if self._reshaping is not None:
            out = self._reshaping.attend(self._band, self.columns, query, key, value, rule, params)
            if out is not None:
                return out.transpose(1, 2)
        if self._tails and (rule.window is None or rule.window >= key.shape[2]):
            outs = [tail.attend(query, key, value, params) for tail in self._tails]
            return torch.cat(outs).transpose(1, 2)
        rule = LayerRule(window=rule.window)
        return self._band.attend(query, key, value, rule, params).transpose(1, 2)

    def num_rows(self) -> Tensor:
        """Number of computed rows of each prompt, ``(B,)`` on the CPU."""
        return (self.query.kind != Kind.PAD).sum(1).cpu()

    def num_columns(self) -> Tensor:
        """Number of columns of each prompt, ``(B,)`` on the CPU."""
        return (self._band.key.kind != Kind.PAD).sum(1).cpu()

    def forget(self) -> None:
        """Drops the masks. Afterwards only the counts can be used."""
        self._band.forget()

    def attention_macs(self) -> list[Tensor]:
        """Multiply-adds of attention in each `executed` layer, with masked scores, ``(B,)``."""
        calls = self.executed.values()
        return [sum(self._pairs(w, b).cpu() * macs for w, macs, b in layer) for layer in calls]

    def _pairs(self, window: int | None, block: int) -> Tensor:
        pairs = self._band.pairs(window)
        if pairs is not None:
            return pairs
        rows, columns = self.num_rows(), self.num_columns()
        full, rest = columns // block, columns % block
        causal = block * block * full * (full + 1) // 2 + rest * columns
        return torch.where(rows == 1, columns, causal)


class Tail(NamedTuple):
    """Prompts whose computed rows are the last of their columns, without padding: causal."""

    prompts: slice
    rows: slice
    columns: slice

    def attend(self, query: Tensor, key: Tensor, value: Tensor, params: AttentionParams) -> Tensor:
        """Attends these prompts. Returns ``(prompts, H, R, D)``, with zeros in padding rows."""
        keys, values = (states[self.prompts, :, self.columns] for states in (key, value))
        out = tail_attention(query[self.prompts, :, self.rows], keys, values, params)
        return F.pad(out, (0, 0, self.rows.start, 0))


def find_tails(query: Rows, key: Rows) -> list[Tail]:
    """Tails that cover the whole batch; [] if a prompt computes other rows than its last ones.

    Computed rows ``(B, R)`` have padding before them, columns ``(B, N)`` after them. For few rows
    after many columns the result is [], too: their mask is small. A single row needs neither.
    """
    counts = torch.stack([(rows.kind != Kind.PAD).sum(1) for rows in (query, key)], dim=1).tolist()
    width = query.kind.shape[1]
    size = len(counts) if all(pair == counts[0] for pair in counts) else 1  # prompts of a tail
    parts = list(enumerate(counts[::size]))
    tails = [Tail(slice(i, i + size), slice(width - r, width), slice(0, n)) for i, (r, n) in parts]
    few = [rows for _, (rows, n) in parts if 4 * rows < 3 * n]
    if few and (few != [1] or len(parts) > 1):
        return []
    return tails if all(_is_tail(query, key, tail) for tail in tails) else []


def _is_tail(query: Rows, key: Rows, tail: Tail) -> bool:
    count = tail.rows.stop - tail.rows.start
    order = key.order[tail.prompts, tail.columns][:, -count:]
    dense = (key.kind[tail.prompts, tail.columns] != Kind.PAD).all()
    dense &= (query.group[tail.prompts, tail.rows] == GLOBAL).all()  # others see only their group
    return bool(dense) and count > 0 and torch.equal(query.order[tail.prompts, tail.rows], order)
