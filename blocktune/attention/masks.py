"""Masks made by the visibility rule: in blocks of rows, or dense as a reference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from blocktune.attention.kernels import (
    AttentionParams,
    Mask,
    check_rows,
    masked_attention,
    plain_attention,
)
from blocktune.layout import FIRST_LAYER, LayerRule, Layout, Rows, visible

KEPT_CELLS = 1 << 24  # most mask elements that a plan keeps for all its layers: 64 MiB in float32


@dataclass
class MaskRoom:
    """Number of mask elements (``cells``) that a plan may still keep."""

    cells: int = KEPT_CELLS

    def take(self, cells: int) -> bool:
        """Reserves room for more elements. Returns False if there is not enough."""
        fits = cells <= self.cells
        self.cells -= cells if fits else 0
        return fits


class MaskForm(NamedTuple):
    """Memory format of a mask that a kernel takes without copying it in every layer."""

    dtype: torch.dtype  # bool, or that of the scores for an additive mask
    copies: int = 1  # how often rows are repeated, for query heads folded into rows
    align: int = 1  # each row starts at a multiple of this many elements


SEEN = MaskForm(torch.bool)  # for code that computes the scores itself


def mask_form(query: Tensor, key: Tensor, params: AttentionParams) -> MaskForm:
    """The form for `masked_attention` of ``query`` ``(G, H, R, D)`` to ``key`` ``(G, K, N, D)``."""
    if not params.is_plain:
        return SEEN
    if not query.is_cuda:
        return MaskForm(query.dtype)
    # The fused kernel on CUDA loads 16 bytes of a mask at once: 16 elements fit any dtype.
    return MaskForm(query.dtype, copies=query.shape[1] // key.shape[1], align=16)


def formed(seen: Tensor, form: MaskForm) -> Tensor:
    """Converts a bool mask ``(G, 1, R, N)``, True where visible, to ``(G, 1, copies * R, N)``."""
    if form == SEEN:
        return seen
    groups, _, rows, keys = seen.shape
    wide = keys + -keys % form.align
    mask = seen.new_zeros((groups, form.copies, rows, wide), dtype=form.dtype)[..., :keys]
    mask.masked_fill_(~seen, float("-inf"))
    return mask.flatten(1, 2)[:, None]


Span = tuple[slice, slice]
"""Adjacent rows, and a range of keys that includes all they may see."""


class Block(NamedTuple):
    """A span and its mask, ``(G, 1, rows, keys)`` bool, True where the row sees the key."""

    rows: slice
    keys: slice
    mask: Tensor


@dataclass(frozen=True)
class RowBand:
    """Masked attention in blocks of query rows, over the keys in their reach; both by order.

    Masks are made once per rule and kept while there is room, else made again, block by block, in
    each layer and its backward.
    """

    query: Rows  # the query rows, ``(G, R)``
    key: Rows  # the rows of the keys, ``(G, N)``
    superseded_until: Tensor  # `Layout.superseded_until` of the keys, ``(G, N)``
    query_exists: Tensor
    key_exists: Tensor
    row_block: int  # rows of a block
    room: MaskRoom  # shared by the bands of a plan
    _spans: dict = field(default_factory=dict, repr=False)
    _masks: dict = field(default_factory=dict, repr=False)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, rule: LayerRule, params: AttentionParams
    ) -> Tensor:
        """Attends ``query`` ``(G, H, R, D)`` to ``(G, K, N, D)``. Returns ``(G, H, R, D)``."""
        outs = []
        for (rows, keys), mask in self._masked(rule, mask_form(query, key, params)):
            states = query[:, :, rows], key[:, :, keys], value[:, :, keys]
            outs.append(masked_attention(*states, mask, params))
        return torch.cat(outs, dim=2) if len(outs) > 1 else outs[0]

    def blocks(self, rule: LayerRule) -> Iterator[Block]:
        """Yields blocks with bool masks. Together they have up to rows x keys elements."""
        for span, mask in self._masked(rule, SEEN):
            yield Block(*span, mask() if callable(mask) else mask)

    def forget(self) -> None:
        """Drops the masks once attention is done."""
        self._masks.clear()

    def pairs(self, window: int | None) -> Tensor | None:
        """Number of scores in a layer, ``(G,)``; None if no layer with this window used blocks."""
        if window not in self._spans:
            return None
        spans = self._spans[window]
        return sum(self.query_exists[:, rows].sum(1) * _length(keys) for rows, keys in spans)

    def spans(self, window: int | None) -> list[Span]:
        """Blocks of rows with their ranges of keys, for layers with this window; memoised."""
        if window not in self._spans:
            count, step = self.query.kind.shape[1], self.row_block
            rows = (slice(a, min(a + step, count)) for a in range(0, count, step))
            self._spans[window] = [(part, self._keys(part, window)) for part in rows]
        return self._spans[window]

    def _keys(self, rows: slice, window: int | None) -> slice:
        missing, order = ~self.query_exists[:, rows], self.query.order[:, rows]
        far = torch.iinfo(order.dtype).max // 2  # half the range: a window is subtracted from it
        last = order.masked_fill(missing, -far).amax(1, keepdim=True)
        seen = self.key_exists & (self.key.order <= last)
        if window is not None:
            first = order.masked_fill(missing, far).amin(1, keepdim=True)
            seen &= self.key.order > first - window
        columns = seen.any(0).nonzero().squeeze(1)
        return slice(int(columns[0]), int(columns[-1]) + 1) if len(columns) else slice(0, 1)

    def _masked(self, rule: LayerRule, form: MaskForm) -> Iterator[tuple[Span, Mask]]:
        """Yields blocks with their masks, or functions that make these if they do not fit."""
        spans = self.spans(rule.window)
        make = [partial(self._mask, span, rule, form) for span in spans]
        if (rule, form) not in self._masks:
            cells = sum(_length(rows) * _length(keys) for rows, keys in spans)
            fits = self.room.take(cells * len(self.query.kind) * form.copies)
            self._masks[rule, form] = [make_mask() for make_mask in make] if fits else None
        return zip(spans, self._masks[rule, form] or make, strict=True)

    def _mask(self, span: Span, rule: LayerRule, form: MaskForm) -> Tensor:
        rows, keys = span
        mask = visible(
            self.query.map(lambda f: f[:, rows, None]),
            self.key.map(lambda f: f[:, None, keys]),
            self.superseded_until[:, None, keys],
            rule,
        )
        mask = mask & self.query_exists[:, rows, None] & self.key_exists[:, None, keys]
        # Rows that see nothing (padding, ended rows) get one key, because kernels may return NaN
        # for an empty row. Their output is never used.
        mask[..., 0] |= ~mask.any(-1)
        return formed(mask[:, None], form)


def _length(part: slice) -> int:
    return part.stop - part.start


def dense_mask(layout: Layout, rule: LayerRule = FIRST_LAYER) -> Tensor:
    """The dense mask of a layout ``(B, S)``.

    Returns bool ``(B, 1, S, S)``, True where the row (third axis) sees the key (last axis). Stock
    models take it as ``attention_mask`` with ``sdpa``; ``eager`` would add it to the scores.
    """
    query = layout.rows().map(lambda field: field[:, None, :, None])
    key = layout.rows().map(lambda field: field[:, None, None, :])
    return visible(query, key, layout.superseded_until[:, None, None, :], rule)


class DensePlan:
    """Reference for tests and small inputs: attention with a dense mask, in float32."""

    def __init__(self, layout: Layout):
        self.layout, self.written = layout, layout.written

    def attend(self, query, key, value, rule, params) -> Tensor:
        """Implements `Plan.attend`."""
        check_rows(self.layout.kind.shape, query, key)
        out = plain_attention(query, key, value, dense_mask(self.layout, rule), params)
        return out.transpose(1, 2)
