"""Split attention: all chunks as one batch, then global rows over everything before them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from blocktune.attention.kernels import ROW_BLOCK, AttentionParams, causal_attention, check_rows
from blocktune.attention.masks import KEPT_CELLS, MaskRoom, RowBand
from blocktune.layout import FOREVER, GLOBAL, NO_ROW, Kind, LayerRule, Layout

NARROW_BLOCK = 64  # rows per block on a CPU where many rows share few keys; see `_stack`


class RowSegment(NamedTuple):
    """Rows that attend together, as indices into the flattened ``B * S`` rows, by order."""

    query: list[int]  # the query rows
    key: list[int]  # rows that they may see
    own: bool  # whether the keys are the query rows themselves
    causal: bool  # whether each row sees exactly the segment's rows up to itself


def find_segments(layout: Layout) -> list[RowSegment]:
    """Splits the rows of a layout on the CPU, except padding, into segments that attend alone.

    Each group (a chunk with its blanks) is one. So are the global rows before the first chunk: the
    prefix, or a whole prompt in full attention. The keys of a prompt's other global rows are all
    its rows except blanks; the rule selects among them.
    """
    rows = layout.rows().map(lambda field: field.flatten().tolist())
    order, group, blank = rows.order, rows.group, [kind == Kind.BLANK for kind in rows.kind]
    fresh = [original != NO_ROW for original in rows.supersedes]
    ends = [layer != FOREVER for layer in rows.until]

    def alone(own: list[int]) -> RowSegment:
        """Rows that see only each other; causal unless some end early or share an order."""
        in_order = all(order[left] < order[right] for left, right in pairwise(own))
        return RowSegment(own, own, own=True, causal=in_order and not any(ends[i] for i in own))

    prompts = defaultdict(list)
    for index, (kind, sample) in enumerate(zip(rows.kind, rows.sample, strict=True)):
        if kind != Kind.PAD:
            prompts[index // layout.num_rows, sample].append(index)
    segments = []
    for prompt in prompts.values():
        prompt.sort(key=lambda index: (order[index], fresh[index]))
        groups = defaultdict(list)
        for index in prompt:
            groups[group[index]].append(index)
        wide = groups.pop(GLOBAL, [])
        segments += map(alone, groups.values())
        # Later global rows do not see these, in some layer.
        special = [i for i in prompt if fresh[i] or ends[i] or blank[i] or group[i] != GLOBAL]
        start = min((order[index] for index in special), default=math.inf)
        lead = [index for index in wide if order[index] < start]
        if lead:
            segments.append(alone(lead))
        if tail := wide[len(lead) :]:
            keys = [index for index in prompt if not blank[index]] or tail
            segments.append(RowSegment(tail, keys, own=False, causal=False))
    return segments


@dataclass(frozen=True)
class _Bucket:
    """Stacked segments of similar length."""

    query: Tensor  # indices into the ``B * S`` rows, padded on the right with -1, (G, R)
    key: Tensor  # (G, N)
    causal: bool
    own: bool  # whether the keys are the query rows
    span: int  # distance in order from first to last row; a larger window hides nothing
    band: RowBand

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, rule: LayerRule, params: AttentionParams
    ) -> Tensor:
        """Attends queries ``(G * R, heads, D)`` to ``(G * N, heads, D)``; result like queries."""
        query = query.unflatten(0, self.query.shape).transpose(1, 2)
        key, value = (x.unflatten(0, self.key.shape).transpose(1, 2) for x in (key, value))
        if self.causal and (rule.window is None or rule.window > self.span):
            out = causal_attention(query, key, value, params)
        else:
            out = self.band.attend(query, key, value, rule, params)
        return out.transpose(1, 2).flatten(0, 1)


class SplitPlan:
    """Attention by segments. It is exact and differentiable, on any device."""

    def __init__(self, layout: Layout, kept_cells: int = KEPT_CELLS):
        """Keeps at most ``kept_cells`` mask elements. ValueError: all rows are padding."""
        self.shape, self.written = layout.kind.shape, layout.written
        self._endings = layout.endings
        segments = find_segments(layout.to("cpu"))
        if not segments:
            raise ValueError("all rows are padding; leave empty prompts out of the batch")
        room = MaskRoom(kept_cells)
        self._buckets = [_stack(bucket, layout, room) for bucket in _by_length(segments)]
        self._queries = _Parts([bucket.query for bucket in self._buckets], layout)
        # Each row is a key in at most one own and one wide segment.
        kinds = [[b.key for b in self._buckets if b.own == own] for own in (True, False)]
        self._keys = [_Parts(keys, layout) for keys in kinds]

    def attend(self, query, key, value, rule, params) -> Tensor:
        """Implements `Plan.attend`. The query rows and the keys are the layout's rows."""
        check_rows(self.shape, query, key)
        rule = rule.first_alike(self._endings)  # layers with the same rows share a mask
        q, k, v = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value))
        keys, values = ([part for parts in self._keys for part in parts(rows)] for rows in (k, v))
        outs = [
            bucket.attend(*rows, rule, params)
            for bucket, *rows in zip(self._buckets, self._queries(q), keys, values, strict=True)
        ]
        return move_rows(torch.cat(outs), self._queries.map.back).unflatten(0, self.shape)


class _Parts:
    """Gathers the rows of several index tensors; a negative index is a row of zeros."""

    def __init__(self, parts: list[Tensor], layout: Layout):
        none = torch.empty(0, dtype=torch.int64, device=layout.device)
        self.sizes = [part.numel() for part in parts]
        self.map = RowMap(torch.cat([none, *map(torch.flatten, parts)]), layout.kind.numel())

    def __call__(self, rows: Tensor) -> list[Tensor]:
        moved = move_rows(rows, self.map)
        # A single part is returned as is, to save a copy in backward.
        return [moved] if len(self.sizes) == 1 else list(moved.split(self.sizes))


def _by_length(segments: list[RowSegment], slack: float = 1.25) -> list[list[RowSegment]]:
    """Groups segments, own keys first, so that padding is at most a quarter of a bucket's rows."""
    buckets: list[list[RowSegment]] = []
    for segment in sorted(segments, key=lambda s: (not s.own, s.causal, len(s.key), len(s.query))):
        first = buckets[-1][0] if buckets else None
        if (
            first is None
            or (first.own, first.causal) != (segment.own, segment.causal)
            or len(segment.key) > slack * len(first.key)
            or len(segment.query) > slack * len(first.query)
        ):
            buckets.append([])
        buckets[-1].append(segment)
    return buckets


def _stack(segments: list[RowSegment], layout: Layout, room: MaskRoom) -> _Bucket:
    def padded(rows: Iterable[list[int]]) -> Tensor:
        indices = [torch.tensor(row) for row in rows]
        return pad_sequence(indices, batch_first=True, padding_value=-1).to(layout.device)

    query, key = padded(s.query for s in segments), padded(s.key for s in segments)
    flat = layout.rows().map(lambda field: field.flatten())
    # Narrow blocks save work: early rows (of early turns) are not scored against late keys. But on
    # a GPU narrow blocks are inefficient, and for few rows over many keys, the gradient of the keys
    # costs more per block than is saved.
    narrow = query.device.type == "cpu" and 4 * query.shape[1] > key.shape[1]
    band = RowBand(
        query=flat.map(lambda field: field[query]),
        key=flat.map(lambda field: field[key]),
        superseded_until=layout.superseded_until.flatten()[key],
        query_exists=query >= 0,
        key_exists=key >= 0,
        row_block=NARROW_BLOCK if narrow else ROW_BLOCK,
        room=room,
    )
    order = layout.order.flatten().tolist()
    span = max(order[segment.query[-1]] - order[segment.query[0]] for segment in segments)
    return _Bucket(query, key, segments[0].causal, segments[0].own, span, band)


class RowMap:
    """Gathers rows so that each source row goes to at most one target row.

    So the gradient is a gather, too; that of ``index_select`` took longer than attention itself.
    """

    def __init__(self, source: Tensor, num_sources: int):
        """``source`` ``(T,)`` int64 is each target's source row, or negative for a row of zeros."""
        self._source = source
        self._num_sources = num_sources
        self._index = source.clamp(min=0)
        self._blank = (source < 0).nonzero().squeeze(1)
        self._start = int(source[0]) if len(source) else 0
        run = torch.arange(self._start, self._start + len(source), device=source.device)
        self._is_run = self._start >= 0 and torch.equal(source, run)

    @cached_property
    def back(self) -> RowMap:
        """The inverse map, with zeros for source rows that are not used."""
        real = (self._source >= 0).nonzero().squeeze(1)
        source = torch.full((self._num_sources,), -1, device=self._source.device)
        source[self._source[real]] = real
        return RowMap(source, len(self._source))

    def __call__(self, rows: Tensor) -> Tensor:
        """Gathers ``(T, ...)`` from ``rows`` ``(sources, ...)``; a view if they are adjacent."""
        if self._is_run:
            return rows.narrow(0, self._start, len(self._source))
        moved = rows.index_select(0, self._index)
        return moved.index_fill_(0, self._blank, 0) if len(self._blank) else moved


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, row_map: RowMap) -> Tensor:
        ctx.row_map = row_map
        return row_map(rows)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.row_map.back(grad), None


move_rows = _Move.apply  # gathers rows ``(sources, ...)`` by a `RowMap`, differentiably
