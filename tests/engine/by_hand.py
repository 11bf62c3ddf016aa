"""Methods that score by the question or repair by a shift, worked by hand on stock models."""

import math

import torch
from engine.served import ASK
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv

from blocktune.attention.interface import cache_argument
from blocktune.layout import Kind
from blocktune.positions import LayerRope, relocate_keys

LAYERS = 3


def inputs_of(engine):
    """Naive reuse of `ASK` as `generate` is given it."""
    return engine.cache(ASK.chunks, "naive").inputs(ASK.question)


@torch.no_grad()
def attention(stock, inputs, columns, positions: str) -> list[torch.Tensor]:
    """The question's weights over all columns, mean over heads, ``(Q, N)`` by layer."""
    cache, ids, at = inputs[cache_argument(stock)], inputs["input_ids"], inputs["position_ids"]
    count = cache.get_seq_length()
    rest = at[:, count:]
    if positions == "encoded":
        own = torch.zeros(count, dtype=torch.int64)
        for chunk in range(-1, int(columns.chunk.max()) + 1):
            rows = (columns.chunk[:count] == chunk).nonzero().flatten()
            own[rows] = torch.arange(len(rows))
        moved = DynamicCache()
        rope = LayerRope(stock.model.rotary_emb.inv_freq)
        for index, layer in enumerate(cache.layers):
            keys = relocate_keys(layer.keys, (own - at[0, :count])[None], rope)
            moved.update(keys, layer.values, index)
        rest = rest - rest[0, 0] + own.max() + 1
        cache = moved
    made = stock(
        ids[:, count:], position_ids=rest, past_key_values=cache, output_attentions=True
    ).attentions
    return [weights[0].mean(0) for weights in made]


def over(weights, columns, kinds):
    """Weights ``(..., N)`` that sum to 1 over the columns of some kinds."""
    kept = sum(columns.kind == kind for kind in kinds).bool()
    return weights * kept / (weights * kept).sum(-1, keepdim=True)


def top(scores, columns, ratio) -> set[int]:
    is_chunk = columns.kind == Kind.CHUNK
    count = math.ceil(ratio * int(is_chunk.sum()) - 1e-9)
    ranked = scores.masked_fill(~is_chunk, -1).argsort(descending=True)
    return set(ranked[:count].tolist())


@torch.no_grad()
def per_head(stock, inputs) -> list[torch.Tensor]:
    """The question's weights, ``(H, Q, N)`` by layer."""
    cache, ids, at = inputs[cache_argument(stock)], inputs["input_ids"], inputs["position_ids"]
    count = cache.get_seq_length()
    options = {"past_key_values": cache, "output_attentions": True}
    made = stock(ids[:, count:], position_ids=at[:, count:], **options)
    return [weights[0] for weights in made.attentions]


@torch.no_grad()
def relaxed_by_hand(stock, engine, columns, ratio: float, sees: str) -> torch.Tensor:
    """RelaxKV on a stock Llama: a choice of each layer, its closure, and what those rows see."""
    inputs, is_chunk = inputs_of(engine), columns.kind == Kind.CHUNK
    model, ids, at = stock.model, inputs["input_ids"], inputs["position_ids"]
    cache, total = inputs[cache_argument(stock)], ids.shape[1]
    count, depth = cache.get_seq_length(), torch.zeros(total, dtype=torch.int64)
    for index, weights in enumerate(attention(stock, inputs_of(engine), columns, "prompt")):
        depth[list(top(weights.mean(0), columns, ratio))] = index + 1
    assert depth.unique().tolist() == [0, 1, 2, 3], "layers choose differently"
    shown = ~is_chunk | (depth > 0) | (sees == "all")
    depth[count:] = LAYERS
    rows = (depth > 0).nonzero().flatten()
    hidden = model.embed_tokens(ids)
    cos, sin = model.rotary_emb(hidden, at)
    hidden = hidden[:, rows]
    for index, layer in enumerate(model.layers):
        kept = depth[rows] > index
        rows, hidden = rows[kept], hidden[:, kept]
        attend, norm = layer.self_attn, layer.input_layernorm(hidden)
        query, keys, values = (
            projection(norm).unflatten(-1, (-1, attend.head_dim)).transpose(1, 2)
            for projection in (attend.q_proj, attend.k_proj, attend.v_proj)
        )
        query, keys = apply_rotary_pos_emb(query, keys, cos[:, rows], sin[:, rows])
        stored = []
        for old, new in ((cache.layers[index].keys, keys), (cache.layers[index].values, values)):
            whole = torch.cat([old, new.new_zeros(*old.shape[:2], total - count, old.shape[3])], 2)
            whole[:, :, rows] = new
            stored.append(repeat_kv(whole, attend.num_key_value_groups))
        seen = (torch.arange(total) <= rows[:, None]) & (shown | ~is_chunk[rows][:, None])
        scores = (query @ stored[0].transpose(2, 3) * attend.scaling).masked_fill(~seen, -math.inf)
        out = scores.softmax(-1) @ stored[1]
        hidden = hidden + attend.o_proj(out.transpose(1, 2).flatten(2))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return stock.lm_head(model.norm(hidden))[0, -1]


@torch.no_grad()
def shifted_by_hand(stock, inputs, columns, ratio: float) -> torch.Tensor:
    """AgentKVShift's algorithm 1 on a stock Llama, layer by layer, one prompt; logits ``(V,)``."""
    model, ids, at = stock.model, inputs["input_ids"], inputs["position_ids"]
    cache, total = inputs[cache_argument(stock)], ids.shape[1]
    count, chunk = cache.get_seq_length(), columns.chunk
    hidden = model.embed_tokens(ids)
    cos, sin = model.rotary_emb(hidden, at)
    rows = ((columns.kind == Kind.CHUNK) | (torch.arange(total) >= count)).nonzero().flatten()
    hidden, weights = hidden[:, rows], None
    for index, layer in enumerate(model.layers):
        attend, norm = layer.self_attn, layer.input_layernorm(hidden)

        def heads(projection, norm=norm, attend=attend):
            return projection(norm).unflatten(-1, (-1, attend.head_dim)).transpose(1, 2)

        query, keys, values = map(heads, (attend.q_proj, attend.k_proj, attend.v_proj))
        query, keys = apply_rotary_pos_emb(query, keys, cos[:, rows], sin[:, rows])
        stored = [
            torch.cat([s, torch.zeros_like(new[:, :, :1]).expand(-1, -1, total - count, -1)], 2)
            for s, new in zip(
                (cache.layers[index].keys, cache.layers[index].values), (keys, values), strict=True
            )
        ]
        if index == 1:
            apart = [
                (new - old[:, :, rows]) for new, old in zip((keys, values), stored, strict=True)
            ]
            distances = [part[0].transpose(0, 1).flatten(1).norm(dim=1) for part in apart]
            weights, probes = [], []
            for distance in distances:
                whole = torch.zeros(total).index_put((rows,), distance)
                own = set()
                for one in range(int(chunk.max()) + 1):
                    members = ((chunk == one) & (columns.kind == Kind.CHUNK)).nonzero().flatten()
                    best = whole[members].argsort(descending=True)
                    own |= set(members[best[: math.ceil(ratio * len(members) - 1e-9)]].tolist())
                weights.append(whole.clamp(max=1))
                probes.append(own)
            kept = [i for i, r in enumerate(rows.tolist()) if r >= count or r in set.union(*probes)]
            rows, hidden = rows[kept], hidden[:, kept]
            query, keys, values = query[:, :, kept], keys[:, :, kept], values[:, :, kept]
        if weights is not None:
            for state, new, weight, own in zip(
                stored, (keys, values), weights, probes, strict=True
            ):
                old, listed = state.clone(), rows.tolist()
                for one in range(int(chunk.max()) + 1):
                    members = ((chunk == one) & (columns.kind == Kind.CHUNK)).nonzero().flatten()
                    asked = [m for m in members.tolist() if m in own]
                    residual = torch.stack(
                        [new[0, :, listed.index(m)] - old[0, :, m] for m in asked], 1
                    ).mean(1)
                    for member in members.tolist():
                        if member not in listed:
                            state[0, :, member] += weight[member] * residual
        for state, new in zip(stored, (keys, values), strict=True):
            state[:, :, rows] = new
        groups = attend.num_key_value_groups
        scores = query @ repeat_kv(stored[0], groups).transpose(2, 3) * attend.scaling
        scores = scores.masked_fill(torch.arange(total)[None] > rows[:, None], float("-inf"))
        out = scores.softmax(-1) @ repeat_kv(stored[1], groups)
        hidden = hidden + attend.o_proj(out.transpose(1, 2).flatten(2))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return stock.lm_head(model.norm(hidden))[0, -1]
