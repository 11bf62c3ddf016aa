"""What a prefill leaves in its cache: how far keys and values are from full prefill's.

Which tokens deviate most, and how far layers agree on them: observations 1, 2 and 4 of
arXiv:2603.20218. `observe.py` uses it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from blocktune.attention.cached import CachePlan
from blocktune.attention.kernels import AttentionParams, plain_scores
from blocktune.data import RagExample
from blocktune.engine.rows import computed_rows
from blocktune.layout import Kind, LayerRule, Rows, visible
from blocktune.methods import Cached, build
from blocktune.methods.select import top_share

RATIO = 0.15
"""Share of the context tokens that counts as high, the default of CacheBlend and the study."""
FIRST_TOKENS = 8
"""Tokens of a chunk that count as its beginning."""


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
    run.state.model(
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


class Chosen(NamedTuple):
    """The tokens with the highest deviation in each layer.

    Attributes:
        deviation: Of keys, ``(L, T)``.
        top: Whether a token is among the highest of its layer, ``(L, T)`` bool.
        offset: Place of each token in its chunk, ``(T,)``.
        chunk: Chunk of each token, ``(T,)``.
    """

    deviation: NDArray[np.float64]
    top: NDArray[np.bool_]
    offset: NDArray[np.int64]
    chunk: NDArray[np.int64]


def chosen_tokens(away: Deviation, ratio: float) -> Chosen:
    """Ranks the tokens of a prompt by deviation, layer by layer; layer 0 chooses none.

    Args:
        away: What `deviation` measured for a method that keeps positions.
        ratio: Share of the context tokens that counts as high, in (0, 1].

    Raises:
        ValueError: If the method moves tokens, or the ratio is no such share.
    """
    if away.keys is None:
        raise ValueError(
            "this method puts chunks at other positions than full prefill, so their keys do not "
            "compare; choose one with sequential positions, such as 'naive' or 'link0'"
        )
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio must be a share in (0, 1], got {ratio}")
    keys = away.keys
    everywhere = keys.new_ones(keys.shape).bool()
    total = keys.new_full((len(keys),), keys.shape[1]).long()
    top = top_share(keys, everywhere, total, ratio)
    top[0] = False  # keys of layer 0 know no context: what differs there is rounding
    return Chosen(keys.double().numpy(), top.numpy(), away.offset.numpy(), away.chunk.numpy())


def overlap_of(chosen: Chosen) -> NDArray[np.float64]:
    """Share of the tokens chosen in layer i that are chosen in layer j too, ``(L, L)``."""
    top = chosen.top.astype(float)
    return (top @ top.T) / top.sum(1, keepdims=True).clip(1)


def cumulative_of(deviation: NDArray[np.float64]) -> NDArray[np.float64]:
    """Deviation accrued over tokens from the highest to the lowest, ``(L, T)``, not normalised."""
    return np.cumsum(-np.sort(-deviation, axis=1), axis=1)


def beginnings_of(chosen: Chosen) -> NDArray[np.float64]:
    """Share of each layer's choice that are first tokens of their chunk, ``(L,)``."""
    first = chosen.offset < FIRST_TOKENS
    return chosen.top[:, first].sum(1) / chosen.top.sum(1).clip(1)


def choice_of(away: Deviation, ratio: float = RATIO) -> dict[str, Any]:
    """What one prompt says of choosing tokens, as plain JSON types.

    Returns:
        ``beginnings``: of each layer's choice, the share that are first tokens of their chunk;
        ``first_share``: what it would be if any token were as likely. ``overlap``: see
        `overlap_of`. ``constant``: tokens that all layers but the first choose, of a layer's
        choice. ``accrued``: share of each layer's deviation that its choice holds.
    """
    chosen = chosen_tokens(away, ratio)
    high = np.where(chosen.top, chosen.deviation, 0).sum(1)
    return {
        "beginnings": beginnings_of(chosen).tolist(),
        "first_share": float((chosen.offset < FIRST_TOKENS).mean()),
        "overlap": overlap_of(chosen).tolist(),
        "constant": float(chosen.top[1:].all(0).sum() / max(1, chosen.top[-1].sum())),
        "accrued": (high / chosen.deviation.sum(1).clip(1e-12)).tolist(),
    }


def by_layer(engine: Any, example: RagExample, method: Any) -> dict[str, Any]:
    """What one prompt says of a method's states, as plain JSON types.

    Returns:
        ``keys`` and ``values``: mean deviation by layer; ``choice``: see `choice_of` (both None
        where keys do not compare); ``entropy`` of the question's attention by layer. Empty where
        the method joins no chunk caches.
    """
    if method.cached is not Cached.CHUNKS:
        return {}
    words = engine.format
    if engine.prompts.spec(method).block and words.full_tag != words.block_tag:
        # Full attention after the same tag: what reuse changes is measured, not what a tag does.
        engine = engine.reworded(replace(words, full_tag=words.block_tag))
    away = deviation(engine, example, method, build("full-prefill"))
    return {
        "keys": None if away.keys is None else away.keys.mean(1).tolist(),
        "values": away.values.mean(1).tolist(),
        "choice": None if away.keys is None else choice_of(away),
        "entropy": attention_entropy(engine.prefilled([example], method)).tolist(),
    }
