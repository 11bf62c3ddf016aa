"""What a prefill leaves in its cache: how far keys and values are from full prefill's, by layer."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from blocktune.attention.cached import CachePlan
from blocktune.attention.kernels import AttentionParams, plain_scores
from blocktune.data import RagExample
from blocktune.engine.rows import computed_rows
from blocktune.layout import Kind, LayerRule, Rows, visible


class States(NamedTuple):
    """Context tokens of one prompt after a prefill, in prompt order.

    Attributes:
        keys: RoPE applied, ``(L, K, T, D)`` float32.
        values: ``(L, K, T, D)`` float32.
        chunk: Chunk of each token, ``(T,)``.
        offset: Place in its chunk, ``(T,)``.
        position: For RoPE, ``(T,)``.
    """

    keys: Tensor
    values: Tensor
    chunk: Tensor
    offset: Tensor
    position: Tensor


class Deviation(NamedTuple):
    """How far each context token's states are from full prefill's.

    Attributes:
        keys: Mean over heads of the Euclidean distance, ``(L, T)``; None where the method puts
            tokens at other positions, since RoPE then turns their keys.
        values: The same of values, ``(L, T)``.
        chunk: Chunk of each token, ``(T,)``.
        offset: Place in its chunk, ``(T,)``.
    """

    keys: Tensor | None
    values: Tensor
    chunk: Tensor
    offset: Tensor


def states_of(run: Any) -> States:
    """Reads the context's states of a batch of one prompt after its prefill."""
    columns, cache = run.columns, run.cache
    context = (columns.kind[0] == Kind.CHUNK).nonzero().squeeze(1)
    keys = torch.stack([layer.keys[0][:, context] for layer in cache.layers])
    values = torch.stack([layer.values[0][:, context] for layer in cache.layers])
    facts = (getattr(columns, name)[0, context].cpu() for name in ("chunk", "offset", "position"))
    return States(keys.float().cpu(), values.float().cpu(), *facts)


def deviation(engine: Any, example: RagExample, method: Any, oracle: Any) -> Deviation:
    """Compares a method's states with full prefill's.

    Args:
        engine: Runs both.
        example: The prompt.
        method: Name or a built method that keeps all chunks.
        oracle: Full prefill, likewise.

    Raises:
        ValueError: If the method does not keep the same context tokens.

    Source: arXiv:2603.20218, section 4.1 (delta K), measured after the whole prefill.
    """
    own, full = (states_of(engine.prefilled([example], one)) for one in (method, oracle))
    if own.chunk.shape != full.chunk.shape:
        raise ValueError(
            f"the method keeps {len(own.chunk)} context tokens, full prefill {len(full.chunk)}; "
            "deviation compares the same tokens: choose a method that keeps all chunks"
        )
    moved = not torch.equal(own.position, full.position)
    keys = None if moved else _distance(own.keys, full.keys)
    return Deviation(keys, _distance(own.values, full.values), full.chunk, full.offset)


def _distance(own: Tensor, full: Tensor) -> Tensor:
    return (own - full).norm(dim=-1).mean(dim=1)


@torch.no_grad()
def attention_entropy(run: Any) -> Tensor:
    """Entropy of the question's attention in each layer, in nats: mean over rows and heads.

    The question's rows are computed once more over what the prefill left. It is the entropy of
    plain attention, also where a method reshapes it.

    Returns:
        ``(L,)`` float32.

    Source: arXiv:2412.16545, where it goes with accuracy (R about 0.95 in magnitude).
    """
    computed = computed_rows(run.batch, run.batch.layout.kind == Kind.QUERY)
    watch = _EntropyWatch(CachePlan(computed.rows, run.columns), computed.rows, run.columns)
    run.cache.select(computed.columns)
    run.server.model(
        computed.ids,
        position_ids=computed.rows.position,
        plan=watch,
        past_key_values=run.cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return torch.stack([watch.entropy[layer] for layer in sorted(watch.entropy)])


class _EntropyWatch:
    """Attends by another plan and notes the entropy of every row's weights."""

    def __init__(self, plan: CachePlan, query: Rows, key: Rows):
        self.plan, self.query, self.key = plan, query, key
        self.entropy: dict[int, Tensor] = {}

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, rule: LayerRule, params: AttentionParams
    ) -> Tensor:
        """See `Plan.attend`."""
        own = LayerRule(window=rule.window)
        seen = visible(
            self.query.map(lambda field: field[:, :, None]),
            self.key.map(lambda field: field[:, None]),
            torch.zeros_like(self.key.kind)[:, None],
            own,
        )
        scores = plain_scores(query, key, seen[:, None], params).float()
        log = scores.log_softmax(-1)
        entropy = -(log.exp() * log.masked_fill(~seen[:, None], 0.0)).sum(-1)
        exists = (self.query.kind != Kind.PAD)[:, None].expand_as(entropy)
        self.entropy[rule.layer] = entropy[exists].mean().cpu()
        return self.plan.attend(query, key, value, rule, params)
