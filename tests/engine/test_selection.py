"""Every way of choosing tokens, served, equals one forward under the dense mask."""

from dataclasses import dataclass

import pytest
import torch
from engine.served import (
    ASK,
    FOREVER,
    FORMAT,
    SHORT,
    context_columns,
    dense_logits,
    engine_of,
    served_spans,
)
from families import BASE, FAMILIES, dealt
from families import build as model_of
from transformers import DeepseekV3Config

from blocktune.engine import Engine
from blocktune.engine.attention_probes import ScoringPasses
from blocktune.engine.layer_schedule import _seeing_future
from blocktune.layout import GLOBAL, NO_CHUNK, NO_ROW, Kind, Rows
from blocktune.methods import Method, build
from blocktune.methods.select import (
    AttentionDeviation,
    AuxiliaryAttention,
    ChunkProbes,
    Deviation,
    Everything,
    FirstK,
    GradualDeviation,
    LayerRange,
    Nothing,
    Oracle,
    QueryAttention,
    Random,
    Recency,
    Reselect,
    Selection,
)
from blocktune.prompt import Pieces

# Logits of these models reach about 10; prompts have fewer than 256 positions.
TOLERANCE = {"rtol": 0, "atol": 1e-4}
METHODS = [
    build("cacheblend-paper", ratio=0.3),
    build("cacheblend-repo", ratio=0.3),
    build("cacheblend-lmcache", ratio=0.5),
    build("epic", k=2, last=1),
    build("cacheclip", ratio=0.25, window=3),
    build("droidspeak", first_layer=1, ratio=0.5),
    build("droidspeak-clc", ratio=0.3, restart_layer=2),
    build("query-attention", ratio=0.25),
    build("query-attention", ratio=0.25, positions="encoded", fuse="max"),
    build("infoflow", ratio=0.25),
    build("a3", ratio=0.25),
    build("selective-reconstruction", ratio=0.25),
    build("selective-reconstruction", ratio=0.25, impact="recency"),
    build("random", ratio=0.25),
    build("oracle", ratio=0.25),
]
SELECTORS = [
    ChunkProbes(),
    Deviation(),
    Deviation(by="values", squared=True, of="cached", keeps_keys=True),
    GradualDeviation(),
    FirstK(),
    LayerRange(),
    Reselect(restart_layer=2),
    QueryAttention(),
    AuxiliaryAttention(window=3),
    AttentionDeviation(),
    Recency(),
    Random(),
    Oracle(),
]


@dataclass(frozen=True)
class Chooses(Method):
    """Plain placement and encoding, any selector."""

    source = ""
    selector: Selection

    def select(self) -> Selection:
        return self.selector


def deep(family: str, layers: int = 4):
    """A config of a family with more layers: room for choosing again and again."""
    config = FAMILIES[family]()
    if kinds := getattr(config, "layer_types", None):
        config.layer_types = (list(kinds) * layers)[:layers]
    config.num_hidden_layers = layers
    if family == "mistral":  # all layers slide: the last row must still reach a seam
        config.sliding_window = 40
    return config


def label(value) -> str:
    if isinstance(value, Selection):
        return type(value).__name__
    return getattr(value, "name", None) or str(value)


def on_families(name, cases):
    """A share of the cases on every family."""
    pairs, on = dealt(FAMILIES, cases), ["engine"]
    return pytest.mark.parametrize(("engine", name), pairs, ids=label, indirect=on, scope="module")


@pytest.fixture(scope="module")
def engine(request, tokenizer):
    return engine_of(deep(request.param), tokenizer)


@pytest.fixture(scope="module")
def llama(tokenizer):
    return engine_of(deep("llama"), tokenizer)


@on_families("method", METHODS)
def test_served_logits_match_one_dense_forward(engine, method):
    served, spans = served_spans(engine, ASK, method)
    torch.testing.assert_close(served, dense_logits(engine, ASK, method, spans), **TOLERANCE)
    # One fresh token less is seen: the nearest to the question, which windows reach.
    last = max(spans, key=lambda span: (span.until == FOREVER, span.column))
    wrong = [span for span in spans if span != last]
    moved = (served - dense_logits(engine, ASK, method, wrong)).abs().max()
    assert moved > 10 * TOLERANCE["atol"]


@on_families("selector", SELECTORS)
def test_the_whole_budget_is_a_full_prefill_and_none_is_plain_reuse(engine, selector):
    everything, nothing = (Chooses(selector.with_budget(ratio)) for ratio in (1.0, 0.0))
    full, naive = (engine.next_logits([ASK], name) for name in ("full-prefill", "naive"))
    if not selector.widens(4):  # a layer that starts from stored states is no full prefill's
        torch.testing.assert_close(engine.next_logits([ASK], everything), full, **TOLERANCE)
    torch.testing.assert_close(engine.next_logits([ASK], nothing), naive, **TOLERANCE)


@pytest.mark.parametrize("method", METHODS, ids=label)
def test_a_ragged_batch_matches_single_prompts(llama, method):
    together = llama.next_logits([ASK, SHORT], method)
    alone = torch.cat([llama.next_logits([ask], method) for ask in (ASK, SHORT)])
    torch.testing.assert_close(together, alone, **TOLERANCE)


@pytest.mark.parametrize("method", METHODS, ids=label)
def test_half_precision_is_served(llama, tokenizer, method):
    half = Engine(model_of(llama.model.config).bfloat16(), tokenizer, format=FORMAT)
    difference = half.next_logits([ASK], method).float() - llama.next_logits([ASK], method)
    assert difference.abs().max() < 0.2 * llama.next_logits([ASK], method).abs().max()


def test_choices_of_a_whole_range_of_layers_are_those(llama):
    _, spans = served_spans(llama, ASK, build("droidspeak", first_layer=1, ratio=0.5))
    assert {(span.since, span.until) for span in spans} == {(1, 3)}
    _, spans = served_spans(llama, ASK, build("droidspeak", first_layer=2, ratio=0.5))
    assert {(span.since, span.until) for span in spans} == {(2, FOREVER)}


def test_the_last_chunks_states_make_a_range_of_all_layers_but_the_first(llama):
    """From layer 1 on, everything: all that is lost is what layer 0 would have carried over."""
    method = build("droidspeak", first_layer=1, ratio=0.75)
    full = llama.next_logits([ASK], "full-prefill")
    naive = llama.next_logits([ASK], "naive")
    served = llama.next_logits([ASK], method)
    assert (served - full).abs().max() > 1e-3
    assert (served - naive).abs().max() > 1e-3


def test_gradual_filtering_narrows_at_every_layer(llama):
    usage = llama.answer([ASK], build("cacheblend-paper", ratio=0.5, spread=0.4))[0].usage
    whole, *later = usage.layer_tokens
    assert whole == usage.context_tokens
    assert later == sorted(later, reverse=True)
    assert later[0] > later[-1]
    assert usage.probed_tokens == sum(usage.layer_tokens[:-1])


def test_the_mask_of_cacheblends_code_lets_recomputed_tokens_see_the_future(llama):
    plain, wrong = (build("cacheblend-repo", ratio=0.3, sees_future=f) for f in (False, True))
    moved = (llama.next_logits([ASK], plain) - llama.next_logits([ASK], wrong)).abs().max()
    assert moved > 10 * TOLERANCE["atol"]


@pytest.mark.parametrize("question", [20, 40, 60])
@pytest.mark.parametrize("name", ["cacheblend-lmcache", "cacheblend-lmcache-flash"])
def test_lmcache_takes_its_share_of_the_tokens_that_come_from_caches(llama, name, question):
    """Prefix 12 and chunks 5 x 40: int(0.15 * 212) of the chunks' tokens, whatever the question.

    Under the flash mask the k-th of them sees all but the last 30 - k columns before the question.
    """
    ids = iter(range(10, 500))
    prefix, *chunks = (tuple(next(ids) for _ in range(n)) for n in (12, 40, 40, 40, 40, 40))
    pieces = Pieces(prefix, tuple(chunks), tuple(range(5, 5 + question)))
    run = llama.start([pieces], name)
    assert run.prefill.layer_tokens(4).tolist() == [[200, 31, 31, 31]]
    [seen] = run.prefill.plans[-1].query.order.tolist()
    if name.endswith("flash"):
        assert seen == [212 - 31 + k for k in range(31 + question)]
    else:
        assert seen[31:] == list(range(212, 212 + question))


def test_the_last_of_the_computed_rows_sees_all_columns_each_before_it_one_less():
    def rows(kinds, orders):
        order = torch.tensor([orders])
        same = {"position": order, "order": order, "offset": order}
        fixed = {"chunk": NO_CHUNK, "group": GLOBAL, "sample": 0, "supersedes": NO_ROW, "until": 9}
        filled = {name: torch.full_like(order, value) for name, value in fixed.items()}
        return Rows(kind=torch.tensor([kinds]), **same, **filled)

    chunk, pad = int(Kind.CHUNK), int(Kind.PAD)
    columns = rows([chunk] * 9, range(9))
    query = rows([pad, chunk, chunk, chunk], [0, 2, 5, 8])
    assert _seeing_future(query, columns).order.tolist() == [[0, 6, 7, 8]]


def test_latents_are_compared_as_the_values_and_keys_that_they_make(tokenizer):
    heads = {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16, "kv_lora_rank": 16}
    shape = BASE | heads | {"q_lora_rank": 16, "num_key_value_heads": 4, "num_hidden_layers": 3}
    engine = engine_of(DeepseekV3Config(**shape, first_k_dense_replace=3), tokenizer)
    full, naive = (engine.prefilled([ASK], name) for name in ("full-prefill", "naive"))
    true, stale = (run.cache.layers[1] for run in (full, naive))
    latent, rotated = true.keys - stale.keys, true.values - stale.values
    changes = {"values": latent, "keys": torch.cat([latent, rotated], -1)}
    norms = {by: change[0, 0].norm(dim=-1) for by, change in changes.items()}
    is_chunk = naive.columns.kind[0] == Kind.CHUNK
    for by, norm in norms.items():
        run = engine.prefilled([ASK], f"naive + deviation by={by} ratio=0.3")
        last = next(plan for plan in run.prefill.plans if 2 in plan.executed)
        best = norm.masked_fill(~is_chunk, -1.0).topk(int(last.context_rows)).indices
        assert context_columns(last) == set(best.tolist())
    truth = ScoringPasses(naive, naive.assembled.cached).full_prefill()
    for by, found in (("keys", truth.key_deviation), ("values", truth.value_deviation)):
        expected = norms[by][is_chunk]
        torch.testing.assert_close(found[1, 0, is_chunk], expected, rtol=0, atol=1e-4)


def test_the_random_bound_draws_by_its_seed(llama):
    first, again, other = (
        llama.next_logits([ASK], build("random", seed=seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


def test_the_oracle_is_nearer_to_a_full_prefill_than_chance_is(llama):
    full = llama.next_logits([ASK], "full-prefill").log_softmax(-1)

    def divergence(method):
        logits = llama.next_logits([ASK], method).log_softmax(-1)
        return float((full.exp() * (full - logits)).sum())

    chance = sum(divergence(build("random", ratio=0.3, seed=seed)) for seed in range(5)) / 5
    assert divergence(build("oracle", ratio=0.3)) < chance
    assert divergence("naive") > divergence(Chooses(Everything())) < 1e-6
    assert divergence(Chooses(Nothing())) == pytest.approx(divergence("naive"))


def test_a_compiled_model_computes_the_rows_of_each_batch(tokenizer):
    engine = engine_of(deep("llama"), tokenizer)
    method = build("cacheblend", ratio=0.4)
    before = engine.next_logits([ASK], method)
    engine.model.compile(backend="eager")
    torch.testing.assert_close(engine.next_logits([ASK], method), before)
