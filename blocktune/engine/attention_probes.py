"""Reading attention weights while a model runs, for selectors that choose tokens by them."""

from __future__ import annotations

from collections.abc import Container, Iterator

import torch
from torch import Tensor

from blocktune.attention import Plan
from blocktune.attention.kernels import AttentionParams, attention_weights, plain_scores
from blocktune.layout import GLOBAL, Kind, LayerRule, Rows, visible

ROW_BLOCK = 64
"""Rows whose weights over all keys are in memory at once."""


class ProbeDone(Exception):
    """Ends a forward pass: what was wanted of it is known."""


class Probe:
    """Computes the scores of some rows a second time, and counts ``multiply_adds`` ``(B,)``."""

    def __init__(self, batch_size: int):
        self.multiply_adds = torch.zeros(batch_size, dtype=torch.int64)

    def scores(
        self,
        wanted: Tensor,
        rows: Rows,
        columns: Rows,
        query: Tensor,
        key: Tensor,
        rule: LayerRule,
        params: AttentionParams,
    ) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of rows and their scores ``(B, H, block, N)`` before softmax.

        Rows ``(B, R)`` see all of ``columns`` ``(B, N)`` before them, in the rule's window. A block
        may hold more than the ``wanted`` rows, ``(B, R)`` bool. ``query`` is ``(B, H, R, D)``,
        ``key`` ``(B, K, N, D)``.
        """
        window = LayerRule(window=rule.window)
        read = wanted.any(0).nonzero().squeeze(1).tolist()
        stop = read[-1] + 1 if read else 0
        for start in range(read[0] if read else 0, stop, ROW_BLOCK):
            block = slice(start, min(start + ROW_BLOCK, stop))
            mask = visible(
                rows.map(lambda field, block=block: field[:, block, None]),
                columns.map(lambda field: field[:, None]),
                torch.zeros_like(columns.kind)[:, None],
                window,
            )
            yield block, plain_scores(query[:, :, block], key, mask[:, None], params)
        macs = query.shape[1] * query.shape[3] * key.shape[2]
        self.multiply_adds += (wanted.sum(1) * macs).cpu()


class ChunkAttention(Probe):
    """What the question's rows, and rows of chunks that no cache held, pay each chunk.

    Attributes:
        mass: Attention weight that each column's row pays each chunk, mean over heads, summed over
            the layers read, ``(B, N, C)`` float32; zero for rows that are not read.
        layers: Layers read.
    """

    def __init__(self, columns: Rows):
        """Prepares for a pass over ``columns`` ``(B, N)``."""
        super().__init__(len(columns.kind))
        self.columns = columns
        chunks = torch.arange(int(columns.chunk.max()) + 1, device=columns.chunk.device)
        is_chunk = columns.kind == Kind.CHUNK
        self.member = (is_chunk[..., None] & (columns.chunk[..., None] == chunks)).float()
        self.mass = torch.zeros_like(self.member)
        self.layers = 0

    def read(
        self, rows: Rows, query: Tensor, key: Tensor, rule: LayerRule, params: AttentionParams
    ) -> None:
        """Adds one layer's weights; arguments as in `Probe.scores`, a row's order is its column."""
        column = rows.order.clamp(min=0)
        uncached = self.columns.group.gather(1, column) == GLOBAL
        wanted = (rows.kind == Kind.QUERY) | ((rows.kind == Kind.CHUNK) & uncached)
        for block, scores in self.scores(wanted, rows, self.columns, query, key, rule, params):
            paid = attention_weights(scores, params).mean(1) @ self.member
            paid = torch.where(wanted[:, block, None], paid, 0.0)
            self.mass.scatter_add_(1, column[:, block, None].expand_as(paid), paid)
        self.layers += 1

    def of_question(self) -> Tensor:
        """What the question's rows paid each chunk in the layers read, ``(B, C)``."""
        asks = self.columns.kind == Kind.QUERY
        return torch.where(asks[..., None], self.mass, 0.0).sum(1)


class QueryProbe(Probe):
    """Attends by another plan, and reads what the question's rows attend to.

    Attributes:
        by_layer: The attention weight of each key, mean over the question's rows and the heads,
            ``(B, N)`` float32, by layer.
    """

    def __init__(self, plan: Plan, query: Rows, key: Rows, layers: Container[int], last: int):
        """Reads ``layers`` of a pass by ``plan``, ``query`` ``(B, R)`` over ``key`` ``(B, N)``.

        All rows see everything before them. The pass ends in layer ``last``, if there is one.
        """
        super().__init__(len(query.kind))
        self.plan, self.query, self.key = plan, query, key
        self.layers, self.last = layers, last
        self.by_layer: dict[int, Tensor] = {}

    def attend(self, query, key, value, rule, params) -> Tensor:
        """Implements `Plan.attend`."""
        if rule.layer in self.layers:
            asks = self.query.kind == Kind.QUERY
            total = key.new_zeros(key.shape[0], key.shape[2], dtype=torch.float32)
            for block, scores in self.scores(asks, self.query, self.key, query, key, rule, params):
                weights = attention_weights(scores, params).mean(1)
                total += torch.where(asks[:, block, None], weights, 0.0).sum(1)
            self.by_layer[rule.layer] = total / asks.sum(1).clamp(min=1)[:, None]
        if rule.layer == self.last:
            raise ProbeDone
        return self.plan.attend(query, key, value, rule, params)


class OutsideProbe(Probe):
    """Reads, in the first layer, how much attention leaves the row's own chunk; then ends the pass.

    Attributes:
        share: Share of each row's attention that goes elsewhere, mean over the heads, ``(B, R)``.
    """

    def __init__(self, rows: Rows):
        """Reads a pass of ``rows`` ``(B, R)`` over themselves."""
        super().__init__(len(rows.kind))
        self.rows = rows
        self.share = torch.zeros_like(rows.kind, dtype=torch.float32)

    def attend(self, query, key, value, rule, params) -> Tensor:
        """Implements `Plan.attend`; never returns."""
        rows, chunk = self.rows, self.rows.chunk
        wanted = rows.kind == Kind.CHUNK
        for block, scores in self.scores(wanted, rows, rows, query, key, rule, params):
            own = (chunk[:, block, None] == chunk[:, None]) & (rows.kind != Kind.LINK)[:, None]
            inside = scores.masked_fill(~own[:, None], float("-inf")).logsumexp(-1)
            outside = 1 - (inside - scores.logsumexp(-1)).exp().mean(1)
            self.share[:, block] = torch.where(wanted[:, block], outside, 0.0)
        raise ProbeDone
