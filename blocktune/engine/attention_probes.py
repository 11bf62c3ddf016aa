"""Plans that also read how attention is spread, for selectors that choose by it."""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import Tensor

from blocktune.attention import Plan
from blocktune.attention.kernels import AttentionParams, plain_scores
from blocktune.layout import GLOBAL, Kind, LayerRule, Rows, visible


class ChunkAttention:
    """Reads the weights of the question's rows, and of chunks that no cache held.

    Attributes:
        mass: Attention weight that each column's row pays each chunk, mean over heads, summed over
            the layers read, ``(B, N, C)`` float32; zero for rows that are not read.
        layers: Layers read.
        multiply_adds: Of computing the weights a second time, per prompt, ``(B,)``.
    """

    def __init__(self, columns: Rows):
        """Prepares for a pass over ``columns`` ``(B, N)``."""
        self.columns = columns
        chunks = torch.arange(int(columns.chunk.max()) + 1, device=columns.chunk.device)
        is_chunk = columns.kind == Kind.CHUNK
        self.member = (is_chunk[..., None] & (columns.chunk[..., None] == chunks)).float()
        self.mass = torch.zeros_like(self.member)
        self.layers = 0
        self.multiply_adds = torch.zeros(len(columns.kind), dtype=torch.int64)

    def read(
        self, rows: Rows, query: Tensor, key: Tensor, rule: LayerRule, params: AttentionParams
    ) -> None:
        """Adds one layer's weights.

        Args:
            rows: Facts of the computed rows, ``(B, R)``; a row's order is its column.
            query: ``(B, H, R, D)``.
            key: Of all columns, ``(B, K, N, D)``.
            rule: The layer's part of the rule.
            params: Scaling and soft-capping.
        """
        column = rows.order.clamp(min=0)
        uncached = self.columns.group.gather(1, column) == GLOBAL
        wanted = (rows.kind == Kind.QUERY) | ((rows.kind == Kind.CHUNK) & uncached)
        for block in blocks(wanted):
            mask = mask_of(rows, self.columns, block, LayerRule(window=rule.window))
            scores = plain_scores(query[:, :, block], key, mask[:, None], params)
            paid = torch.softmax(scores, dim=-1).mean(1) @ self.member
            paid = torch.where(wanted[:, block, None], paid, 0.0)
            index = column[:, block, None].expand_as(paid)
            self.mass.scatter_add_(1, index, paid)
        self.layers += 1
        macs = query.shape[1] * query.shape[3] * key.shape[2]
        self.multiply_adds += (wanted.sum(1) * macs).cpu()

    def of_question(self) -> Tensor:
        """What the question's rows paid each chunk in the layers read, ``(B, C)``."""
        asks = self.columns.kind == Kind.QUERY
        return torch.where(asks[..., None], self.mass, 0.0).sum(1)


ROW_BLOCK = 64
"""Rows whose weights over all keys are in memory at once."""


class ProbeDone(Exception):
    """Ends a forward pass: what was wanted of it is known."""


class QueryProbe:
    """Attends by another plan, and sums up what the question's rows attend to.

    Attributes:
        scores: By layer, the attention weight of each key, mean over the question's rows and the
            heads, ``(B, N)`` float32.
        multiply_adds: Of computing the weights a second time, per prompt, ``(B,)``.
    """

    def __init__(self, plan: Plan, query: Rows, key: Rows, layers: Container[int], last: int):
        """Watches ``layers`` of a pass of rows ``query`` ``(B, R)`` over ``key`` ``(B, N)``.

        Args:
            plan: Attends.
            query: Facts of the rows, all of which see everything before them.
            key: Facts of the keys.
            layers: Which to watch.
            last: Layer after whose watching the pass ends; one that the model does not have: none.
        """
        self.plan, self.query, self.key = plan, query, key
        self.layers, self.last = layers, last
        self.scores: dict[int, Tensor] = {}
        self._asks = query.kind == Kind.QUERY
        self.multiply_adds = torch.zeros(len(self._asks), dtype=torch.int64)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, rule: LayerRule, params: AttentionParams
    ) -> Tensor:
        """See `Plan.attend`."""
        if rule.layer in self.layers:
            self.scores[rule.layer] = self._read(query, key, LayerRule(window=rule.window), params)
        if rule.layer == self.last:
            raise ProbeDone
        return self.plan.attend(query, key, value, rule, params)

    def _read(self, query: Tensor, key: Tensor, rule: LayerRule, params: AttentionParams) -> Tensor:
        total = key.new_zeros(key.shape[0], key.shape[2], dtype=torch.float32)
        for rows in blocks(self._asks):
            asks = self._asks[:, rows]
            mask = mask_of(self.query, self.key, rows, rule)
            scores = plain_scores(query[:, :, rows], key, mask[:, None], params)
            weights = torch.softmax(scores, dim=-1).mean(1)
            total += torch.where(asks[..., None], weights, 0.0).sum(1)
        asked = self._asks.sum(1)
        self.multiply_adds += (asked * query.shape[1] * query.shape[3] * key.shape[2]).cpu()
        return total / asked.clamp(min=1)[:, None]


class OutsideProbe:
    """Reads, in the first layer, how much attention leaves the row's own chunk; then ends the pass.

    Attributes:
        scores: Share of each row's attention that goes elsewhere, mean over the heads, ``(B, R)``.
        multiply_adds: Of making the scores, per prompt, ``(B,)``.
    """

    def __init__(self, rows: Rows):
        """Watches a pass of ``rows`` ``(B, R)`` over themselves."""
        self.rows = rows
        self.scores = torch.zeros_like(rows.kind, dtype=torch.float32)
        self.multiply_adds = torch.zeros(len(rows.kind), dtype=torch.int64)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, rule: LayerRule, params: AttentionParams
    ) -> Tensor:
        """See `Plan.attend`; never returns."""
        wanted = self.rows.kind == Kind.CHUNK
        for rows in blocks(wanted):
            mask = mask_of(self.rows, self.rows, rows, LayerRule(window=rule.window))
            chunk = self.rows.chunk
            own = (chunk[:, rows, None] == chunk[:, None]) & (self.rows.kind != Kind.LINK)[:, None]
            scores = plain_scores(query[:, :, rows], key, mask[:, None], params)
            inside = scores.masked_fill(~own[:, None], float("-inf")).logsumexp(-1)
            outside = 1 - (inside - scores.logsumexp(-1)).exp().mean(1)
            self.scores[:, rows] = torch.where(wanted[:, rows], outside, 0.0)
        self.multiply_adds += (wanted.sum(1) * query.shape[1] * query.shape[3] * key.shape[2]).cpu()
        raise ProbeDone


def mask_of(query: Rows, key: Rows, rows: slice, rule: LayerRule) -> Tensor:
    """Who sees whom among global rows, ``(B, rows, N)`` bool."""
    return visible(
        query.map(lambda field: field[:, rows, None]),
        key.map(lambda field: field[:, None]),
        torch.zeros_like(key.kind)[:, None],
        rule,
    )


def blocks(wanted: Tensor) -> list[slice]:
    """Blocks of rows that hold all rows that any prompt wants, ``(B, R)`` bool."""
    rows = wanted.any(0).nonzero().squeeze(1).tolist()
    if not rows:
        return []
    stop = rows[-1] + 1
    return [slice(a, min(a + ROW_BLOCK, stop)) for a in range(rows[0], stop, ROW_BLOCK)]
