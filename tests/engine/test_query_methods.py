"""Methods that score by the question or repair by a shift, against stock models worked by hand."""

import dataclasses
import math

import pytest
import torch
from engine.served import ASK, context_columns, engine_of
from families import FAMILIES
from families import build as model_of
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv

from blocktune.engine.batch_prefill import prefill_batch
from blocktune.layout import Kind
from blocktune.methods import Selection, build, compose
from blocktune.methods.repair.base import Residual
from blocktune.methods.repair.mean_shift import MeanShift
from blocktune.positions import LayerRope, relocate_keys

LAYERS = 3


def config(family: str = "llama"):
    made = FAMILIES[family]()
    if kinds := getattr(made, "layer_types", None):
        made.layer_types = (list(kinds) * LAYERS)[:LAYERS]
    made.num_hidden_layers = LAYERS
    return made


@pytest.fixture(scope="module")
def engine(tokenizer):
    return engine_of(config(), tokenizer)


@pytest.fixture(scope="module")
def stock(engine):
    """The same weights as a stock model, which can return its attention weights."""
    fresh = config()  # not the engine's: the implementation of attention is written into it
    fresh.vocab_size = engine.model.config.vocab_size
    made = model_of(fresh)
    made.load_state_dict(engine.model.state_dict())
    made.set_attn_implementation("eager")
    return made.eval()


@pytest.fixture(scope="module")
def columns(engine):
    """Facts of each column of the cache of `ASK`, ``(N,)`` each."""
    return engine.prefilled([ASK], "naive").columns.map(lambda field: field[0])


def inputs_of(engine):
    """Naive reuse of `ASK` as `generate` is given it."""
    return engine.cache(ASK.chunks, "naive").inputs(ASK.question)


def chosen(engine, method) -> set[int]:
    """Columns of the chunk tokens that are computed in the last layer."""
    pieces, prompts = engine._read([ASK], method)
    plans = prefill_batch(engine.state, prompts, pieces, method).prefill.plans
    return context_columns(next(plan for plan in plans if LAYERS - 1 in plan.executed))


@torch.no_grad()
def attention(stock, inputs, columns, positions: str) -> list[torch.Tensor]:
    """The question's weights over all columns, mean over heads, ``(Q, N)`` by layer."""
    cache, ids, at = inputs["past_key_values"], inputs["input_ids"], inputs["position_ids"]
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


def test_infoflow_takes_the_norm_over_the_questions_rows_in_the_last_two_layers(
    engine, stock, columns
):
    sets = {}
    for positions in ("prompt", "encoded"):
        layers = attention(stock, inputs_of(engine), columns, positions)
        norm = torch.stack([weights.norm(dim=0) for weights in layers[-2:]]).mean(0)
        sets[positions] = top(norm, columns, 0.3)
        assert chosen(engine, build("infoflow", ratio=0.3, positions=positions)) == sets[positions]
    mean = torch.stack([weights.mean(0) for weights in layers]).mean(0)
    assert len(set(map(frozenset, [*sets.values(), top(mean, columns, 0.3)]))) == 3


@torch.no_grad()
def per_head(stock, inputs) -> list[torch.Tensor]:
    """The question's weights, ``(H, Q, N)`` by layer."""
    cache, ids, at = inputs["past_key_values"], inputs["input_ids"], inputs["position_ids"]
    count = cache.get_seq_length()
    options = {"past_key_values": cache, "output_attentions": True}
    made = stock(ids[:, count:], position_ids=at[:, count:], **options)
    return [weights[0] for weights in made.attentions]


def test_prophetkv_averages_all_layers_over_what_is_cached(engine, stock, columns):
    layers = per_head(stock, inputs_of(engine))
    kinds = (Kind.PREFIX, Kind.CHUNK)
    mean = torch.stack([over(w, columns, kinds).mean((0, 1)) for w in layers]).mean(0)
    assert chosen(engine, build("prophetkv", ratio=0.3)) == top(mean, columns, 0.3)
    whole = torch.stack([w.mean((0, 1)) for w in layers]).mean(0)
    assert chosen(engine, build("query-attention", ratio=0.3)) == top(whole, columns, 0.3)


def test_a3_scores_the_first_layer_over_the_chunks_alone(engine, stock, columns):
    first = per_head(stock, inputs_of(engine))[0]
    scores = over(first, columns, (Kind.CHUNK,)).sum((0, 1))
    method = build("a3", ratio=0.3)
    assert chosen(engine, method) == top(scores, columns, 0.3)
    # The pass ends in the first layer: the other layers cost nothing.
    spent, whole = (
        engine.answer([ASK], m, max_new_tokens=1)[0].usage.flops
        for m in (method, build("prophetkv", ratio=0.3))
    )
    assert spent < whole


def test_dropping_the_rest_after_the_first_layer_is_choosing_before_it(engine):
    """A3's code computes layer 0 in full; the states of those that are kept are the same."""
    picked = chosen(engine, build("a3", ratio=0.3))
    run = engine.prefilled([ASK], build("a3", ratio=0.3))
    full = engine.prefilled([ASK], "full-prefill").cache.layers[1]
    made = run.cache.layers[1]
    rows = sorted(picked)
    # Layer 1's states follow from layer 0, where every key and value is the true one.
    torch.testing.assert_close(made.keys[0, :, rows], full.keys[0, :, rows], rtol=0, atol=1e-5)
    torch.testing.assert_close(made.values[0, :, rows], full.values[0, :, rows], rtol=0, atol=1e-5)


@torch.no_grad()
def relaxed_by_hand(stock, engine, columns, ratio: float, sees: str) -> torch.Tensor:
    """RelaxKV on a stock Llama: a choice of each layer, its closure, and what those rows see."""
    inputs, is_chunk = inputs_of(engine), columns.kind == Kind.CHUNK
    model, ids, at = stock.model, inputs["input_ids"], inputs["position_ids"]
    cache, total = inputs["past_key_values"], ids.shape[1]
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


def test_relaxkv_is_its_choice_of_targets_and_context_worked_by_hand(engine, stock, columns):
    got = {}
    for sees in ("chosen", "all"):
        got[sees] = engine.next_logits([ASK], build("relaxkv", ratio=0.3, sees=sees))[0]
        expected = relaxed_by_hand(stock, engine, columns, 0.3, sees)
        torch.testing.assert_close(got[sees], expected, rtol=0, atol=1e-4)
    assert (got["chosen"] - got["all"]).abs().max() > 1e-3


def test_recomputed_tokens_at_the_end_do_not_see_hidden_ones_before_them(engine):
    """All but the first chunk's tokens are recomputed: the kernel for tails sees too much."""
    late = compose("naive", select=Late())
    columns = engine.prefilled([ASK], late).columns
    hidden = (columns.chunk == 0) & (columns.kind == Kind.CHUNK)
    assert 4 * int(hidden.sum()) < hidden.shape[1]
    seeing = engine.next_logits([ASK], compose("naive", select=Late(sees="all")))
    pieces = engine.prompts.pieces(ASK, late)
    changed = pieces._replace(chunks=(pieces.chunks[0][::-1], *pieces.chunks[1:]))
    states = [engine.start([one], late).cache.layers[-1].keys for one in (pieces, changed)]
    recomputed = (columns.chunk > 0) & (columns.kind == Kind.CHUNK)
    assert torch.equal(*(one[0][:, recomputed[0]] for one in states))
    assert (engine.next_logits([ASK], late) - seeing).abs().max() > 1e-3


@dataclasses.dataclass(frozen=True)
class Late(Selection):
    """Every chunk but the first."""

    sees: str = "chosen"

    def start(self, layout):
        return layout.is_context & (layout.chunk > 0)


@torch.no_grad()
def shifted_by_hand(stock, inputs, columns, ratio: float) -> torch.Tensor:
    """AgentKVShift's algorithm 1 on a stock Llama, layer by layer, one prompt; logits ``(V,)``."""
    model, ids, at = stock.model, inputs["input_ids"], inputs["position_ids"]
    cache, total = inputs["past_key_values"], ids.shape[1]
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


def test_agentkvshift_is_its_algorithm_worked_by_hand(engine, stock, columns):
    expected = shifted_by_hand(stock, inputs_of(engine), columns, ratio=0.2)
    method = build("agentkvshift", ratio=0.2)
    got = engine.next_logits([ASK], method)[0]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    unrepaired = engine.next_logits([ASK], compose(method, repair=None))[0]
    assert (unrepaired - expected).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "mistral"])
def test_a_repair_of_everything_or_nothing_changes_nothing(family, tokenizer):
    engine = engine_of(config(family), tokenizer)
    full, plain = (engine.next_logits([ASK], name) for name in ("full-prefill", "naive"))
    every, none = (build("agentkvshift", ratio=ratio) for ratio in (1.0, 0.0))
    torch.testing.assert_close(engine.next_logits([ASK], every), full, rtol=0, atol=1e-4)
    assert torch.equal(engine.next_logits([ASK], none), plain)
    some = engine.next_logits([ASK], build("agentkvshift", ratio=0.3))
    assert (some - plain).abs().max() > 1e-3


def test_a_repair_without_a_comparison_gives_every_token_the_whole_mean(engine):
    """First tokens as probes: each other token of the chunk moves by their mean change."""
    run = engine.prefilled([ASK], "epic k=2 + mean-shift")
    plain, cut = (engine.prefilled([ASK], name) for name in ("naive", "epic k=2"))
    columns = run.columns.map(lambda field: field[0])
    # At layer 1 the probes' states are those without the repair, since layer 0 changes nothing.
    for name in ("keys", "values"):
        repaired, old, new = (getattr(one.cache.layers[1], name)[0] for one in (run, plain, cut))
        for chunk in range(3):
            members = ((columns.chunk == chunk) & (columns.kind == Kind.CHUNK)).nonzero().flatten()
            probes, rest = members[:2], members[2:]
            mean = (new[:, probes] - old[:, probes]).mean(1, keepdim=True)
            assert mean.abs().max() > 1e-3
            torch.testing.assert_close(repaired[:, rest], old[:, rest] + mean, rtol=0, atol=1e-5)


def test_a_token_that_barely_deviates_moves_by_that_share_of_the_mean():
    """A chunk of four, the last recomputed with a change of 2; the others deviate by these."""
    change = torch.zeros(1, 1, 4, 1)
    change[0, 0, 3] = 2.0
    recomputed = torch.tensor([[False, False, False, True]])
    deviation = torch.tensor([[0.25, 1.0, 3.0, 4.0]])
    seen = Residual(change, recomputed, ~recomputed, torch.zeros(1, 4, dtype=int), deviation)
    assert MeanShift(share=0.25).offset(seen)[0, 0, :, 0].tolist() == [0.5, 2.0, 2.0, 2.0]


def test_a_repaired_context_is_a_stock_cache(engine):
    context = engine.cache(ASK.chunks, build("agentkvshift", ratio=0.2))
    inputs = context.inputs(ASK.question)
    count = inputs["past_key_values"].get_seq_length()
    rest = inputs["input_ids"][:, count:], inputs["position_ids"][:, count:]
    with torch.no_grad():
        logits = engine.model(
            rest[0], position_ids=rest[1], past_key_values=inputs["past_key_values"]
        ).logits[:, -1]
    served = engine.next_logits([ASK], build("agentkvshift", ratio=0.2))
    torch.testing.assert_close(logits, served, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("method", "line"),
    [
        ("query-attention over=heads", "over must be one of prompt, cached, chunks"),
        ("query-attention pool=max", "pool must be one of mean, norm"),
        ("query-attention positions=global", "positions must be one of prompt, encoded"),
        ("query-attention sees=past", "sees must be one of all, chosen"),
        ("infoflow last_layers=0", "last_layers must be a whole number, at least 1"),
        ("naive + mean-shift share=2", "share must be a share in"),
        ("naive + mean-shift 20 %", "a repair takes no budget"),
    ],
)
def test_a_wrong_parameter_is_one_line(method, line):
    with pytest.raises(ValueError, match=line):
        build(method)
