"""Scoring passes that a selector may ask for before the first layer."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from blocktune.attention import SplitPlan
from blocktune.attention.cached import CachePlan
from blocktune.cache import ChunkStore, RowCache
from blocktune.engine.attention_probes import OutsideProbe, ProbeDone, QueryProbe
from blocktune.engine.rows import computed_rows, of_columns
from blocktune.engine.state import Auxiliaries
from blocktune.engine.usage import Executed, ModelCost
from blocktune.layout import Kind, Rows
from blocktune.methods.reshaped_attention import ReshapedAttention
from blocktune.methods.select import Truth, distance
from blocktune.prompt import Batch, LayoutSpec, Pieces, lay_out, stack


@dataclass
class ScoringPasses:
    """Passes over one batch.

    Attributes:
        auxiliaries: Models besides the served one.
        columns: Facts of the cache's columns, ``(B, N)``.
        cache: Assembled; the passes leave what chunks put there as it is.
        cached: Rows whose states are in the cache, ``(B, S)`` bool.
        executed: What the passes computed, in order.
    """

    model: PreTrainedModel
    auxiliaries: Auxiliaries
    batch: Batch
    pieces: Sequence[Pieces]
    columns: Rows
    cache: RowCache
    cached: Tensor
    store: ChunkStore
    fingerprint: str
    executed: list[Executed] = field(default_factory=list)

    def query_attention(self) -> Tensor:
        """See `Passes.query_attention`."""
        return self._prefill(self._rows & ~self.cached, self.cache)

    def full_prefill(self) -> Truth:
        """See `Passes.full_prefill`."""
        true = RowCache(len(self.cache), *self.columns.kind.shape, exact=True)
        attention = self._prefill(self._rows, true)
        pairs = list(zip(true.layers, self.cache.layers, strict=True))
        keys = torch.stack([distance(a.keys, b.keys) for a, b in pairs])
        values = torch.stack([distance(a.values, b.values) for a, b in pairs])
        layout = self.batch.layout
        return Truth(of_columns(keys, layout), of_columns(values, layout), attention)

    def outside_attention(self) -> Tensor:
        """See `Passes.outside_attention`."""
        computed = computed_rows(self.batch, self._rows)
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
        """See `Passes.auxiliary_attention`."""
        other = self.auxiliaries.get(model)
        spec, layout = LayoutSpec(block=False), self.batch.layout
        prompts = [lay_out(pieces, spec) for pieces in self.pieces]
        batch = stack(prompts, pad_id=0).to(other.device)
        _require_room(model, other, batch.layout.num_rows)
        rows, last = batch.layout.rows(), other.config.get_text_config().num_hidden_layers - 1
        probe = QueryProbe(SplitPlan(batch.layout), rows, rows, (last,), last)
        self._run(other, batch.input_ids, batch.layout.position, probe)
        self.executed.append(_all_but_last(other, rows, probe))
        result = torch.zeros_like(self.cached, dtype=torch.float32)
        # Both hold the same chunk tokens in the same order, among other rows.
        result[layout.is_context] = probe.by_layer[last][batch.layout.is_context].to(result.device)
        return result

    def look_ahead(self, reshaping: ReshapedAttention) -> None:
        """Computes the question over what is cached, for a reshape that wants to see that first."""
        computed = computed_rows(self.batch, self._rows & ~self.cached)
        self.cache.select(computed.columns)
        plan = CachePlan(computed.rows, self.columns, reshaping)
        with reshaping.looking_ahead():
            self._run(self.model, computed.ids, computed.rows.position, plan, self.cache)
        self.executed.append(Executed(self.model, [plan]))

    @property
    def _rows(self) -> Tensor:
        layout = self.batch.layout
        return ~layout.is_pad & (layout.kind != Kind.BLANK)

    def _prefill(self, chosen: Tensor, cache: RowCache) -> Tensor:
        """Computes rows into ``cache``; what the question attends to, ``(L, B, S)``."""
        computed = computed_rows(self.batch, chosen)
        cache.select(computed.columns)
        plan = CachePlan(computed.rows, self.columns)
        layers = range(len(cache))
        probe = QueryProbe(plan, computed.rows, self.columns, layers, last=len(cache))
        self._run(self.model, computed.ids, computed.rows.position, probe, cache)
        self.executed.append(Executed(self.model, [plan], extra=probe.multiply_adds))
        scores = torch.stack([probe.by_layer[layer] for layer in layers])
        return of_columns(scores, self.batch.layout)

    @torch.no_grad()
    def _run(self, model: PreTrainedModel, ids: Tensor, position: Tensor, plan, cache=None) -> None:
        options = {"past_key_values": cache, "use_cache": cache is not None, "logits_to_keep": 1}
        with suppress(ProbeDone):
            model(ids, position_ids=position, plan=plan, **options)


def _all_but_last(model: PreTrainedModel, rows: Rows, probe: QueryProbe) -> Executed:
    """A causal pass over all rows that ended when the last layer's weights were known."""
    cost = ModelCost.of(model)
    count = (rows.kind != Kind.PAD).sum(1).cpu()
    pairs = count * (count + 1) // 2
    below = sum(count * layer.row + pairs * layer.pair for layer in cost.layers[:-1])
    extra = below + count * cost.layers[-1].probe + probe.multiply_adds
    return Executed(model, heads=0, extra=extra)


def _require_room(name: str, model: PreTrainedModel, tokens: int) -> None:
    holds = model.config.get_text_config().max_position_embeddings
    if tokens > holds:
        raise ValueError(
            f"a prompt of {tokens} tokens does not fit into auxiliary model '{name}', whose "
            f"context holds {holds}; take another model or retrieve fewer chunks"
        )
