"""Methods that score by the question or repair by a shift, against stock models worked by hand."""

import dataclasses
import math
from dataclasses import dataclass

import pytest
import torch
from engine.by_hand import (
    LAYERS,
    attention,
    inputs_of,
    over,
    per_head,
    relaxed_by_hand,
    shifted_by_hand,
    top,
)
from engine.served import ASK, context_columns, engine_of
from families import FAMILIES
from families import build as model_of
from torch.utils._python_dispatch import TorchDispatchMode

from blocktune.attention.interface import cache_argument
from blocktune.layout import Kind
from blocktune.methods import Repair, Selection, build, compose
from blocktune.methods.repair import MeanShift, Residual


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


def chosen(engine, method) -> set[int]:
    """Columns of the chunk tokens that are computed in the last layer."""
    plans = engine.prefilled([ASK], method).prefill.plans
    return context_columns(next(plan for plan in plans if LAYERS - 1 in plan.executed))


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


def test_prophetkv_averages_all_layers_over_what_is_cached(engine, stock, columns):
    layers = per_head(stock, inputs_of(engine))
    kinds = (Kind.PREFIX, Kind.CHUNK)
    mean = torch.stack([over(w, columns, kinds).mean((0, 1)) for w in layers]).mean(0)
    assert chosen(engine, build("prophetkv", ratio=0.3)) == top(mean, columns, 0.3)
    whole = torch.stack([w.mean((0, 1)) for w in layers]).mean(0)
    assert chosen(engine, build("query-attention", ratio=0.3)) == top(whole, columns, 0.3)


def test_the_first_of_the_last_layers_is_not_the_models_first(engine):
    first, last = (
        chosen(engine, build("query-attention", ratio=0.3, fuse=fuse, last_layers=1))
        for fuse in ("first", "last")
    )
    assert first == last != chosen(engine, build("query-attention", ratio=0.3, fuse="first"))


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


class WholeMean(MeanShift):
    """The mean over all recomputed tokens, whatever was compared."""

    def offset(self, seen):
        return super().offset(seen._replace(deviation=None))


def test_a_repair_counts_what_a_selector_compared_and_kept(engine):
    """At its second check layer the tokens that the first one dropped move, no others."""
    run = engine.prefilled([ASK], compose("cacheblend-paper", budget=0.4, repair=WholeMean()))
    plain, cut = (engine.prefilled([ASK], name) for name in ("naive", "cacheblend-paper 40 %"))
    for name in ("keys", "values"):
        repaired, old, new = (getattr(one.cache.layers[2], name)[0] for one in (run, plain, cut))
        is_probe = (new != old).any(2).any(0)
        for chunk in range(1, 3):
            own = (run.columns.chunk[0] == chunk) & (run.columns.kind[0] == Kind.CHUNK)
            probes, rest = own & is_probe, own & ~is_probe
            assert min(probes.sum(), rest.sum()) > 1
            mean = (new - old)[:, probes].mean(1, keepdim=True)
            torch.testing.assert_close(repaired[:, rest], old[:, rest] + mean, rtol=0, atol=1e-5)
            assert torch.equal(repaired[:, probes], new[:, probes])


def test_a_token_that_barely_deviates_moves_by_that_share_of_the_mean():
    """A chunk of four, the last recomputed with a change of 2; the others deviate by these."""
    change = torch.zeros(1, 1, 4, 1)
    change[0, 0, 3] = 2.0
    recomputed = torch.tensor([[False, False, False, True]])
    deviation = torch.tensor([[0.25, 1.0, 3.0, 4.0]])
    seen = Residual(change, recomputed, ~recomputed, torch.zeros(1, 4, dtype=int), deviation)
    assert MeanShift(share=0.25).offset(seen)[0, 0, :, 0].tolist() == [0.5, 2.0, 2.0, 2.0]


class Operations(TorchDispatchMode):
    """Counts the operations inside."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def test_a_repair_takes_no_longer_for_many_short_chunks():
    counts = set()
    for chunks in (2, 12):
        chunk = torch.arange(24)[None] * chunks // 24
        first = torch.arange(24)[None] % (24 // chunks) == 0
        seen = Residual(torch.ones(1, 1, 24, 1), first, ~first, chunk, first.float())
        with Operations() as seen_operations:
            MeanShift().offset(seen)
        counts.add(seen_operations.count)
    assert len(counts) == 1, "each operation passes over all columns"


@dataclass(frozen=True)
class Unsure(Repair):
    """Has numbers for the tokens that it is asked about alone."""

    def offset(self, seen):
        return torch.zeros_like(seen.change).masked_fill(~seen.reused[:, None, :, None], math.nan)


def test_an_offset_is_read_where_a_state_is_reused(engine):
    made = engine.next_logits([ASK], compose("epic", budget=0.3, repair=Unsure()))
    torch.testing.assert_close(made, engine.next_logits([ASK], "epic 30 %"), rtol=0, atol=0)


def test_a_repaired_context_is_a_stock_cache(engine):
    context = engine.cache(ASK.chunks, build("agentkvshift", ratio=0.2))
    inputs = context.inputs(ASK.question)
    count = inputs[cache_argument(engine.model)].get_seq_length()
    rest = inputs["input_ids"][:, count:], inputs["position_ids"][:, count:]
    with torch.no_grad():
        logits = engine.model(
            rest[0], position_ids=rest[1], past_key_values=inputs[cache_argument(engine.model)]
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
