"""Probes that read attention during a forward pass, and the extra passes of selectors."""

from __future__ import annotations

import copy
from collections.abc import Container, Iterator
from contextlib import suppress

import torch
from torch import Tensor
from transformers import PreTrainedModel

from blocktune.attention import Plan, SplitPlan, planned_forward
from blocktune.attention.cached import CachePlan
from blocktune.attention.kernels import attention_weights, plain_scores
from blocktune.cache import RowCache
from blocktune.engine.rows import computed_rows, has_column, of_columns
from blocktune.engine.state import ServedBatch
from blocktune.engine.usage import Executed, ModelCost
from blocktune.layout import GLOBAL, Kind, LayerRule, Rows, visible
from blocktune.methods.select import LayerKV, QueryScores, Truth, distance
from blocktune.methods.select.layers import compared
from blocktune.models.gate import context_length
from blocktune.positions import relocate_keys
from blocktune.prompt import LayoutSpec, lay_out, stack

OVER = {"prompt": (), "cached": (Kind.PREFIX, Kind.CHUNK, Kind.WRAP), "chunks": (Kind.CHUNK,)}
"""Kinds of keys that attention weights are normalised over, by `QueryScores.over`; (): all."""
ROW_BLOCK = 64  # rows whose weights over all keys are in memory at once


class ProbeDone(Exception):
    """Stops a forward pass once the probe has its result."""


class ScoreReader:
    """Recomputes the attention scores of some rows, and counts ``multiply_adds`` ``(B,)``."""

    def __init__(self, columns: Rows):
        self.columns = columns
        self.multiply_adds = torch.zeros(len(columns.kind), dtype=torch.int64)

    def scores(
        self, wanted: Tensor, rows: Rows, query, key, rule, params
    ) -> Iterator[tuple[slice, Tensor]]:
        """Yields blocks of (also unwanted) rows and their scores before softmax, ``(B, H, r, N)``.

        Rows ``(B, R)`` see all columns ``(B, N)`` before them, within the rule's window. The other
        arguments are as for `Plan.attend`.
        """
        columns, window = self.columns, LayerRule(window=rule.window)
        read = wanted.any(0).nonzero().squeeze(1).tolist() or [0, -1]
        stop = read[-1] + 1
        for start in range(read[0], stop, ROW_BLOCK):
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


class ChunkAttention(ScoreReader):
    """Measures the attention to each chunk from the question and from chunks computed in full."""

    def __init__(self, columns: Rows):
        super().__init__(columns)
        chunks = torch.arange(int(columns.chunk.max()) + 1, device=columns.chunk.device)
        is_chunk = columns.kind == Kind.CHUNK
        self.member = (is_chunk[..., None] & (columns.chunk[..., None] == chunks)).float()
        # From each column's row to each chunk, mean over heads, summed over layers, (B, N, C).
        self.mass = torch.zeros_like(self.member)
        self.layers = 0  # number read

    def read(self, rows: Rows, query, key, rule, params) -> None:
        """Adds one layer's weights. Arguments as in `scores`; a row's order is its column."""
        column = rows.order.clamp(min=0)
        uncached = self.columns.group.gather(1, column) == GLOBAL
        wanted = (rows.kind == Kind.QUERY) | ((rows.kind == Kind.CHUNK) & uncached)
        for block, scores in self.scores(wanted, rows, query, key, rule, params):
            paid = attention_weights(scores, params).mean(1) @ self.member
            paid = torch.where(wanted[:, block, None], paid, 0.0)
            self.mass.scatter_add_(1, column[:, block, None].expand_as(paid), paid)
        self.layers += 1

    def of_question(self) -> Tensor:
        """Attention mass from the question to each chunk, over the layers read, ``(B, C)``."""
        asks = self.columns.kind == Kind.QUERY
        return torch.where(asks[..., None], self.mass, 0.0).sum(1)


class QueryProbe(ScoreReader):
    """Attends by another plan, and reads the attention weights of the question's rows."""

    def __init__(
        self, plan: Plan, query: Rows, key: Rows, layers: Container[int], how: QueryScores
    ):
        """Reads ``layers`` of rows ``query`` ``(B, R)`` over ``key`` ``(B, N)``."""
        super().__init__(key)
        self.plan, self.query = plan, query
        self.layers, self.depth, self.pool = layers, how.depth, how.pool
        self.by_layer: dict[int, Tensor] = {}  # of each key, pooled, mean over heads, (B, N)
        kinds = OVER[how.over]
        left_out = ~sum(key.kind == kind for kind in kinds).bool() if kinds else None
        # A prompt without any key of these kinds is normalised over all keys.
        self._left_out = None if left_out is None else left_out & ~left_out.all(1, keepdim=True)

    def attend(self, query, key, value, rule, params) -> Tensor:
        if rule.layer in self.layers:
            asks = self.query.kind == Kind.QUERY
            total = key.new_zeros(key.shape[0], key.shape[2], dtype=torch.float32)
            for block, scores in self.scores(asks, self.query, query, key, rule, params):
                if self._left_out is not None:
                    scores = scores.masked_fill(self._left_out[:, None, None], float("-inf"))
                # NaN: the row's window contains no key, so it adds no weight.
                weights = attention_weights(scores, params).nan_to_num().mean(1)
                weights = weights.square() if self.pool == "norm" else weights
                total += torch.where(asks[:, block, None], weights, 0.0).sum(1)
            mean = total / asks.sum(1).clamp(min=1)[:, None]
            self.by_layer[rule.layer] = total.sqrt() if self.pool == "norm" else mean
        if rule.layer + 1 == self.depth:
            raise ProbeDone
        return self.plan.attend(query, key, value, rule, params)


class OutsideProbe(ScoreReader):
    """Measures in the first layer how much attention leaves a row's own chunk; stops the pass."""

    def __init__(self, rows: Rows):
        super().__init__(rows)
        self.share = torch.zeros_like(rows.kind, dtype=torch.float32)  # mean over heads, (B, R)

    def attend(self, query, key, value, rule, params) -> Tensor:
        """Implements `Plan.attend`; always raises `ProbeDone`."""
        rows, chunk = self.columns, self.columns.chunk
        wanted = rows.kind == Kind.CHUNK
        for block, scores in self.scores(wanted, rows, query, key, rule, params):
            own = (chunk[:, block, None] == chunk[:, None]) & (rows.kind != Kind.LINK)[:, None]
            inside = scores.masked_fill(~own[:, None], float("-inf")).logsumexp(-1)
            outside = 1 - (inside - scores.logsumexp(-1)).exp().mean(1)
            self.share[:, block] = torch.where(wanted[:, block], outside, 0.0)
        raise ProbeDone


class ScoringPasses:
    """Extra passes over a batch, listed in ``executed``. They leave cached chunks unchanged."""

    def __init__(self, served: ServedBatch, cached: Tensor):
        self.served, self.cached = served, cached  # rows whose states are in the cache, (B, S)
        self.batch, self.pieces, self.columns = served.batch, served.pieces, served.columns
        self.model, self.cache, encoder = served.state.model, served.cache, served.state.encoder
        self.store, self.fingerprint = encoder.store, encoder.fingerprint
        self.executed: list[Executed] = []

    def query_attention(self, how: QueryScores | None = None) -> Tensor:
        how, chosen = how or QueryScores(), has_column(self.batch.layout) & ~self.cached
        if how.positions == "prompt":
            return self._prefill(chosen, self.cache, how)
        shift, cache = _to_encoded(self.columns), copy.deepcopy(self.cache)
        for layer, rope in zip(cache.layers, self.served.state.rope.layers, strict=True):
            rotated = layer.values if rope.in_values else layer.keys
            rotated.copy_(relocate_keys(rotated, shift, rope))
        return self._prefill(chosen, cache, how, shift)

    def full_prefill(self) -> Truth:
        exact = RowCache(len(self.cache), *self.columns.kind.shape, exact=True)
        attention = self._prefill(has_column(self.batch.layout), exact, QueryScores())
        layers = zip(exact.layers, self.cache.layers, self.served.state.rope.layers, strict=True)
        pairs = [[compared(LayerKV(c.keys, c.values), rope) for c in two] for *two, rope in layers]
        keys = torch.stack([distance(a.keys, b.keys) for a, b in pairs])
        values = torch.stack([distance(a.values, b.values) for a, b in pairs])
        layout = self.batch.layout
        return Truth(of_columns(keys, layout), of_columns(values, layout), attention)

    def outside_attention(self) -> Tensor:
        computed = computed_rows(self.batch, has_column(self.batch.layout))
        probe = OutsideProbe(computed.rows)
        self._run(self.model, computed.ids, computed.rows.position, probe)
        cost = ModelCost.of(self.model)
        rows = (computed.rows.kind != Kind.PAD).sum(1).cpu()
        spent = probe.multiply_adds + rows * cost.layers[0].probe
        self.executed.append(Executed(self.model, heads=0, extra=spent))
        return torch.zeros_like(self.cached, dtype=torch.float32).scatter_add(
            1, computed.index, probe.share
        )

    def auxiliary_attention(self, model: str) -> Tensor:
        other = self.served.state.auxiliaries.get(model)
        spec, layout = LayoutSpec(block=False), self.batch.layout
        prompts = [lay_out(pieces, spec) for pieces in self.pieces]
        batch = stack(prompts, pad_id=0).to(other.device)
        config, num_rows = other.config.get_text_config(), batch.layout.num_rows
        if num_rows > (longest := context_length(config)):
            raise ValueError(
                f"a prompt of {num_rows} tokens does not fit into auxiliary model '{model}', which "
                f"holds {longest}; take another model or retrieve fewer chunks"
            )
        rows, last = batch.layout.rows(), config.num_hidden_layers - 1
        how = QueryScores(depth=last + 1)
        probe = QueryProbe(SplitPlan(batch.layout), rows, rows, (last,), how)
        self._run(other, batch.input_ids, batch.layout.position, probe)
        # The cost of a causal pass over all rows that stops at the last layer's weights.
        cost, count = ModelCost.of(other), (rows.kind != Kind.PAD).sum(1).cpu()
        pairs = count * (count + 1) // 2
        rows_cost = sum(layer.row + layer.column for layer in cost.layers[:-1])
        below = count * rows_cost + pairs * cost.pair * (len(cost.layers) - 1)
        spent = below + count * cost.layers[-1].probe + probe.multiply_adds
        self.executed.append(Executed(other, heads=0, extra=spent))
        result = torch.zeros_like(self.cached, dtype=torch.float32)
        # Both layouts have the same chunk tokens in the same order, but for a chunk's own BOS.
        bos = self.served.state.tokenizer.bos_token_id
        own = layout.is_context & (self.batch.input_ids != (-1 if bos is None else bos))
        result[own] = probe.by_layer[last][batch.layout.is_context].to(result.device)
        return result

    def look_ahead(self) -> None:
        """Computes the question over the cached states, for a reshape that needs its attention."""
        computed = computed_rows(self.batch, has_column(self.batch.layout) & ~self.cached)
        self.cache.select(computed.columns)
        reshaping = self.served.reshaping
        plan = CachePlan(computed.rows, self.columns, reshaping)
        with reshaping.looking_ahead():
            self._run(self.model, computed.ids, computed.rows.position, plan, self.cache)
        self.executed.append(Executed(self.model, [plan]))

    def _prefill(
        self, chosen: Tensor, cache: RowCache, how: QueryScores, shift: Tensor | None = None
    ) -> Tensor:
        """The question's attention, ``(L, B, S)``; ``shift`` ``(B, N)`` moves the positions."""
        computed = computed_rows(self.batch, chosen)
        cache.select(computed.columns)
        plan = CachePlan(computed.rows, self.columns)
        layers = range(how.depth or len(cache))
        probe = QueryProbe(plan, computed.rows, self.columns, layers, how)
        position = computed.rows.position
        if shift is not None:
            position = position + shift.gather(1, computed.columns.clamp(min=0))
        self._run(self.model, computed.ids, position, probe, cache)
        # If the pass stops early, its last layer computed only the keys and queries.
        heads, probes = (1, {}) if how.depth is None else (0, {layers[-1]: plan})
        self.executed.append(Executed(self.model, [plan], probes, heads, probe.multiply_adds))
        scores = torch.stack([probe.by_layer[layer] for layer in layers])
        return of_columns(scores, self.batch.layout)

    @torch.no_grad()
    def _run(self, model: PreTrainedModel, ids: Tensor, position: Tensor, plan, cache=None) -> None:
        with suppress(ProbeDone):
            planned_forward(model, ids, position, plan, cache, logits_to_keep=1)


def _to_encoded(columns: Rows) -> Tensor:
    """Shift of columns from positions in the prompt to those at encoding, ``(B, N)``.

    Rows outside of chunks, except for the prefix, move to positions after the longest chunk.
    """
    kind, position, others = columns.kind, columns.position, columns.chunk.max() + 2
    in_chunk = (kind == Kind.CHUNK) | (kind == Kind.WRAP)
    in_place = (kind == Kind.PREFIX) | (kind == Kind.PAD)
    piece = torch.where(in_chunk, columns.chunk + 1, others).masked_fill(in_place, 0)
    starts = position.new_full((len(kind), int(others) + 1), int(position.max()) + 1)
    start = starts.scatter_reduce(1, piece, position, "amin").gather(1, piece)
    start = start.masked_fill(in_place, 0)
    longest = (position - start).masked_fill(piece == others, -1).amax(1, keepdim=True)
    return torch.where(piece == others, longest + 1, 0) - start
