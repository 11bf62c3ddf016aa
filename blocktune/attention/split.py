"""Split attention: chunks as one batch, then the global rows over everything before them.

A row belongs to exactly one *segment*. Causal segments (a chunk with its ghosts, the prefix, a
whole prompt in full attention) see only themselves, in order, so the fused causal kernel does
them without any mask. What is left are the global rows after the first chunk (links, fresh
rows, query, answer): few rows over many keys, the only place where a mask is made. Work and
memory grow with N x chunk length + global rows x N, never with N x N.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from blocktune.attention.kernels import Knobs, causal_attention, check_rows
from blocktune.attention.rows import RowBand
from blocktune.attention.segments import Segment, find_segments
from blocktune.layout import LayerRule, Layout


@dataclass(frozen=True)
class _Bucket:
    """Segments of similar length, stacked; row indices are into the flattened ``B * S`` rows."""

    query: Tensor  # (G, R), padded on the right by repeating row 0 of the segment
    keep: Tensor  # (kept,) which of the G * R rows are real
    rows: Tensor  # (kept,) the rows that they are
    causal: bool
    key: Tensor  # (G, N); the same tensor as query in causal segments
    band: RowBand


class SplitPlan:
    """Attention by segments; exact, differentiable, on any device."""

    def __init__(self, layout: Layout):
        """Finds the segments of ``layout`` (on the CPU, once per batch) and stacks them."""
        self.shape = layout.kind.shape
        self._layered = layout.is_layered
        segments = find_segments(layout.to("cpu"))
        self._buckets = [_stack(bucket, layout) for bucket in _by_length(segments)]
        total = layout.kind.numel()
        rows = torch.cat([bucket.rows for bucket in self._buckets])
        # Rows of no segment (padding) read the zero row that is appended after the others.
        restore = torch.full((total,), len(rows), device=layout.device)
        restore[rows] = torch.arange(len(rows), device=layout.device)
        self._restore = restore

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, rule: LayerRule, knobs: Knobs
    ) -> Tensor:
        """See `Plan.attend`; the query rows and the keys are the layout's rows."""
        check_rows(self.shape, query, key)
        if not self._layered:
            rule = LayerRule(window=rule.window)  # one mask serves all layers
        flat = [tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value)]
        outs = [_attend_bucket(bucket, *flat, rule, knobs) for bucket in self._buckets]
        outs.append(outs[0].new_zeros(1, *outs[0].shape[1:]))
        return torch.cat(outs).index_select(0, self._restore).unflatten(0, self.shape)


def _attend_bucket(
    bucket: _Bucket, query: Tensor, key: Tensor, value: Tensor, rule: LayerRule, knobs: Knobs
) -> Tensor:
    """Attends one bucket: flattened rows ``(B * S, heads, D)`` to ``(kept, H, D)``."""

    def take(tensor: Tensor, index: Tensor) -> Tensor:
        picked = tensor.index_select(0, index.flatten()).unflatten(0, index.shape)
        return picked.transpose(1, 2)

    q, k, v = take(query, bucket.query), take(key, bucket.key), take(value, bucket.key)
    if bucket.causal and (rule.window is None or rule.window >= bucket.query.shape[1]):
        out = causal_attention(q, k, v, knobs)
    else:
        out = bucket.band.attend(q, k, v, rule, knobs)
    return out.transpose(1, 2).flatten(0, 1).index_select(0, bucket.keep)


def _by_length(segments: list[Segment], slack: float = 1.25) -> list[list[Segment]]:
    """Groups segments so that padding wastes at most a quarter of any bucket's rows."""
    buckets: list[list[Segment]] = []
    for segment in sorted(segments, key=lambda s: (s.causal, len(s.key), len(s.query))):
        first = buckets[-1][0] if buckets else None
        if (
            first is not None
            and first.causal == segment.causal
            and len(segment.key) <= slack * len(first.key)
            and len(segment.query) <= slack * len(first.query)
        ):
            buckets[-1].append(segment)
        else:
            buckets.append([segment])
    return buckets


def _stack(segments: list[Segment], layout: Layout) -> _Bucket:
    device = layout.device
    query, real_query = _pad([segment.query for segment in segments])
    key, real_key = _pad([segment.key for segment in segments])
    flat = layout.rows().map(lambda field: field.flatten())
    query, key, real_query, real_key = (x.to(device) for x in (query, key, real_query, real_key))
    band = RowBand(
        query=flat.map(lambda field: field[query]),
        key=flat.map(lambda field: field[key]),
        superseded_until=layout.superseded_until.flatten()[key],
        query_exists=real_query,
        key_exists=real_key,
    )
    keep = real_query.flatten().nonzero().squeeze(1)
    return _Bucket(
        query=query,
        keep=keep,
        rows=query.flatten()[keep],
        causal=segments[0].causal,
        key=key,
        band=band,
    )


def _pad(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Right-pads index lists: indices ``(G, M)`` and which of them are real, ``(G, M)``."""
    length = max(len(row) for row in rows)
    index = torch.tensor([row + [row[0]] * (length - len(row)) for row in rows])
    real = torch.tensor([[True] * len(row) + [False] * (length - len(row)) for row in rows])
    return index, real
