"""Reshaped answers equal the papers' formulas on one dense forward, in prefill and in decode."""

import pytest
import torch
from engine.served import ASK, FOREVER, SHORT, engine_of, served_spans
from families import FAMILIES, dealt
from methods.reshape.oracle import BestChunks, TwoSoftmaxes, logits_by, rows_of

from blocktune.attention.masks import MaskRoom
from blocktune.methods import build, compose, reshaped_attention

# Logits of these models reach about 10; prompts have fewer than 256 positions.
TOLERANCE = {"rtol": 0, "atol": 1e-4}
SCALED = {"temperature": 0.5, "scale": 0.7}
NEUTRAL = {"temperature": 1.0, "scale": 1.0}


@pytest.fixture(params=FAMILIES)
def engine(request, tokenizer):
    return served(request.param, tokenizer)


@pytest.fixture
def llama(tokenizer):
    return served("llama", tokenizer)


def served(family, tokenizer):
    config = FAMILIES[family]()
    if family == "mistral":  # all layers slide: the last row must still reach a seam
        config.sliding_window = 40
    return engine_of(config, tokenizer)


def merged(engine, method, answer=(), fresh=None, moved=None):
    """Logits by the two softmaxes; ``moved`` is a column that is put into the wrong one."""
    ids, layout, last = rows_of(engine, ASK, method, fresh, answer)
    reshape = method.reshape()
    plan = TwoSoftmaxes(layout, reshape.temperature, reshape.scale)
    if moved is not None:
        plan.reused ^= layout.order == moved
    return logits_by(engine, ids, plan, last)


METHODS = {
    "ape": build("ape", **SCALED),
    "ape-sequential": build("ape", positions="sequential", **SCALED),
    "s+p": build("s+p", blanks=2, **SCALED),
    "psr": build("psr", blanks=2, ratio=0.25, **SCALED),
    "first-k": compose("epic", reshape={"scaled-context": SCALED}),
}


@pytest.mark.parametrize(("engine", "name"), dealt(FAMILIES, METHODS), indirect=["engine"])
def test_prefill_and_decode_match_the_merge_of_two_softmaxes(engine, name):
    method = METHODS[name]
    run = engine.prefilled([ASK], method)
    first, fresh = served_spans(engine, ASK, method)
    torch.testing.assert_close(first, merged(engine, method, fresh=fresh), **TOLERANCE)
    ids, later = run.continued(3)
    torch.testing.assert_close(later[0], merged(engine, method, ids, fresh), **TOLERANCE)

    order = run.batch.layout.order[0]
    kept = {span.column for span in fresh if span.until == FOREVER}
    reused = set(order[run.batch.layout.is_context[0]].tolist()) - kept
    wrong = merged(engine, method, fresh=fresh, moved=max(reused))
    assert (first - wrong).abs().max() > 10 * TOLERANCE["atol"]


@pytest.mark.parametrize("name", ["psr", "first-k", "sel"])
def test_masks_made_again_in_each_layer_change_nothing(llama, monkeypatch, name):
    method = METHODS.get(name) or build(name)
    kept = llama.answer([ASK], method, max_new_tokens=2)[0]
    monkeypatch.setattr(MaskRoom, "take", lambda room, cells: False)
    made = llama.answer([ASK], method, max_new_tokens=2)[0]
    assert made.text == kept.text
    assert made.usage.flops == kept.usage.flops
    first, _ = served_spans(llama, ASK, method)
    monkeypatch.undo()
    assert torch.equal(first, served_spans(llama, ASK, method)[0])


def test_keys_that_were_made_for_a_choice_only_are_fresh_too(tokenizer):
    config = FAMILIES["llama"]()
    config.num_hidden_layers = 3
    engine = engine_of(config, tokenizer)
    method = compose("cacheblend-repo", reshape={"scaled-context": SCALED})
    logits, fresh = served_spans(engine, ASK, method)
    assert {span.until for span in fresh} == {2, FOREVER}
    torch.testing.assert_close(logits, merged(engine, method, fresh=fresh), **TOLERANCE)
    sooner = [s._replace(until=1) if s.until == 2 else s for s in fresh]
    assert (logits - merged(engine, method, fresh=sooner)).abs().max() > 10 * TOLERANCE["atol"]


@pytest.mark.parametrize("name", ["ape", "psr"])
def test_temperature_and_scale_of_one_change_nothing(engine, name):
    method = build(name, **NEUTRAL)
    plain = compose(method, reshape=None)
    run, other = (engine.prefilled([ASK], m) for m in (method, plain))
    torch.testing.assert_close(run.prefill.logits, other.prefill.logits, rtol=0, atol=1e-5)
    (ids, logits), (same, expected) = run.continued(4), other.continued(4)
    assert ids == same
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    scaled = engine.next_logits([ASK], build(name, **SCALED))
    assert (scaled - run.prefill.logits).abs().max() > 1e-3


def test_a_ragged_batch_matches_single_prompts(engine):
    for name in ("ape", "psr", "sel"):
        method = build(name)
        together = engine.next_logits([ASK, SHORT], method)
        alone = torch.cat([engine.next_logits([ask], method) for ask in (ASK, SHORT)])
        torch.testing.assert_close(together, alone, **TOLERANCE)


def test_everything_recomputed_leaves_nothing_to_scale(llama):
    full = llama.next_logits([ASK], "full-prefill")
    scaled = compose("epic", select={"first-k": {"share": 1.0}}, reshape={"scaled-context": SCALED})
    torch.testing.assert_close(llama.next_logits([ASK], scaled), full, rtol=0, atol=1e-5)
    neutral = compose(scaled, reshape={"top-chunks": {"chunks": 3}})
    torch.testing.assert_close(llama.next_logits([ASK], neutral), full, rtol=0, atol=1e-5)


def chosen(engine, method, answer=(), fresh=None):
    reshape = method.reshape()
    ids, layout, last = rows_of(engine, ASK, method, fresh, answer)
    ahead = None
    if reshape.looks_ahead:
        question, rows, end = rows_of(engine, ASK, method)
        first = BestChunks(rows, reshape.chunks, "LHT")
        logits_by(engine, question, first, end)
        ahead = first.totals
    plan = BestChunks(layout, reshape.chunks, reshape.aggregation, ahead)
    return logits_by(engine, ids, plan, last)


@pytest.mark.parametrize("aggregation", ["none", "T", "HT", "LHT"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral", "qwen3"])
def test_prefill_and_decode_match_a_choice_of_chunks(family, aggregation, tokenizer):
    engine = served(family, tokenizer)
    for base in ("sel", "epic"):
        method = compose(base, reshape={"top-chunks": {"chunks": 1, "aggregation": aggregation}})
        run = engine.prefilled([ASK], method)
        first, fresh = served_spans(engine, ASK, method)
        torch.testing.assert_close(first, chosen(engine, method, fresh=fresh), **TOLERANCE)
        ids, later = run.continued(3)
        torch.testing.assert_close(later[0], chosen(engine, method, ids, fresh), **TOLERANCE)
        two = compose(base, reshape={"top-chunks": {"chunks": 2, "aggregation": aggregation}})
        assert (first - chosen(engine, two, fresh=fresh)).abs().max() > 10 * TOLERANCE["atol"]


def test_bfloat16_matches_the_merge_up_to_its_own_rounding(tokenizer):
    config = FAMILIES["llama"]()
    config.dtype = "bfloat16"
    engine = engine_of(config, tokenizer)
    engine.model.bfloat16()
    method = METHODS["s+p"]
    served = engine.next_logits([ASK], method)[0]
    assert served.dtype == torch.bfloat16
    expected = merged(engine, method)
    # 8 bits: two layers, each rounding once more or once less on logits of size 10.
    torch.testing.assert_close(served, expected, rtol=0, atol=0.3)


def test_the_entropy_of_the_question_is_in_the_usage(llama):
    naive, few = (
        llama.answer([ASK, SHORT], method, max_new_tokens=1)
        for method in ("naive", compose("naive", reshape={"top-chunks": {"chunks": 1}}))
    )
    wide = llama.answer([ASK, SHORT], compose("naive", reshape="top-chunks"), max_new_tokens=1)
    assert [answer.usage.query_entropy for answer in naive] == [None, None]
    assert few[0].usage.query_entropy < wide[0].usage.query_entropy
    alone = llama.answer([ASK], compose("naive", reshape="top-chunks"), max_new_tokens=1)[0]
    assert alone.usage.query_entropy == pytest.approx(wide[0].usage.query_entropy, abs=1e-4)


def test_a_reshaped_prefix_never_enters_the_exact_cache(llama):
    class Shaped(type(build("prefix-cache"))):
        def reshape(self):
            return build("sel", chunks=1).reshape()

    before = llama.next_logits([ASK], "full-prefill")
    llama.answer([ASK], Shaped(), max_new_tokens=2)
    run = llama.prefilled([ASK], build("prefix-cache"))
    assert run.assembled.hits == [0]
    torch.testing.assert_close(run.prefill.logits, before, rtol=0, atol=1e-5)


def test_rows_may_be_reshaped_a_few_at_a_time(llama, monkeypatch):
    methods = [METHODS["psr"], build("sel", chunks=1)]
    whole = [llama.next_logits([ASK, SHORT], method) for method in methods]
    monkeypatch.setattr(reshaped_attention, "CELLS", 1 << 11)
    parts = [llama.next_logits([ASK, SHORT], method) for method in methods]
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-5)
