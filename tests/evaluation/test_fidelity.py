"""Closeness to full prefill: zero where nothing differs, by hand where it can be."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from engine.served import ASK, engine_of
from families import FAMILIES

from blocktune.data import RagExample
from blocktune.evaluation.choice import (
    beginnings_of,
    choice_of,
    chosen_tokens,
    cumulative_of,
    overlap_of,
)
from blocktune.evaluation.fidelity import agreement, forced_logits, measure_fidelity
from blocktune.evaluation.figure_states import draw_cumulative, draw_deviation, draw_overlap
from blocktune.evaluation.probe import Deviation, attention_entropy, deviation, states_of
from blocktune.layout import Kind
from blocktune.methods import build
from blocktune.prompt import PromptFormat

EXAMPLE = RagExample(ASK.question, ASK.chunks, ("Noel Fisher",))


@pytest.fixture(scope="module")
def engine(tokenizer):
    return engine_of(FAMILIES["llama"](), tokenizer)


def test_agreement_is_worked_by_hand():
    full = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]])
    own = torch.tensor([[0.0, 0.0], [0.0, 0.0]])
    found = agreement(full, own)
    kl = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert found.kl == pytest.approx(kl / 2)
    assert found.top1 == 0.5
    assert agreement(full, full) == (0.0, 1.0, 2)


def test_full_prefill_agrees_with_itself_and_naive_reuse_does_not(engine):
    oracle, naive = build("full-prefill"), build("naive")
    wanted = forced_logits(engine.prefilled([EXAMPLE], oracle), 3)
    assert 1 <= len(wanted.ids) <= 3
    again = forced_logits(engine.prefilled([EXAMPLE], oracle), 3, wanted.ids)
    other = forced_logits(engine.prefilled([EXAMPLE], naive), 3, wanted.ids)
    assert torch.equal(torch.stack(again.logits), torch.stack(wanted.logits))
    assert agreement(torch.stack(wanted.logits), torch.stack(other.logits)).kl > 1e-3


def test_forced_logits_are_those_of_the_tokens_that_were_forced(engine):
    ids, logits = engine.continued_logits(EXAMPLE, "naive", 2)
    forced = forced_logits(engine.prefilled([EXAMPLE], build("naive")), 3, [*ids, 0])
    torch.testing.assert_close(forced.logits[2][None], logits.float())


def test_deviation_is_zero_for_the_first_chunk_and_where_all_is_fresh(engine):
    away = deviation(engine, EXAMPLE, "naive", "full-prefill")
    layers, tokens = away.values.shape
    assert layers == 2
    assert away.keys.shape == (layers, tokens)
    assert away.keys[0].abs().max() < 1e-4  # the first layer's keys know no context
    later = away.chunk > 0
    assert away.keys[1][later].min() > 1e-3
    fresh = deviation(engine, EXAMPLE, build("cacheblend", ratio=1.0), "full-prefill")
    assert max(fresh.keys.max(), fresh.values.max()) < 1e-4


def test_states_are_read_in_prompt_order(engine):
    states = states_of(engine.prefilled([EXAMPLE], "naive"))
    assert states.chunk.tolist() == sorted(states.chunk.tolist())
    assert states.position.tolist() == sorted(states.position.tolist())
    assert set(states.chunk.tolist()) == {0, 1, 2}


def test_entropy_is_that_of_the_weights_of_a_dense_forward(engine):
    run = engine.prefilled([EXAMPLE], "full-prefill")
    found = attention_entropy(run)
    ids, rows = run.batch.input_ids, run.batch.layout.kind[0] == Kind.QUERY
    with engine.stock_attention() as model:
        model.set_attn_implementation("eager")
        with torch.no_grad():
            weights = model(ids, output_attentions=True, use_cache=False).attentions
    expected = torch.stack(
        [-(w[0][:, rows] * w[0][:, rows].clamp(min=1e-30).log()).sum(-1).mean() for w in weights]
    )
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def measured(engine, step=lambda: None):
    methods = {name: build(name) for name in ("full-prefill", "naive", "no-context")}
    specs = [SimpleNamespace(label=name) for name in methods]
    task, fidelity = object(), SimpleNamespace(num=1, tokens=2)
    suite = SimpleNamespace(methods=specs, tasks=[task], fidelity=fidelity)
    ready = SimpleNamespace(
        suite=suite,
        methods=methods,
        engine=lambda spec, task: engine,
        of=lambda task, limit: [EXAMPLE][:limit],
    )
    return measure_fidelity(ready, step)


def test_the_tag_of_a_mode_is_no_loss_of_fidelity(engine):
    """Full prefill reads the tag that the method reads, so that chunks stand where its own do."""
    one_tag = engine.reworded(PromptFormat(block_tag="[Block]"))
    both = engine.reworded(PromptFormat(block_tag="[Block]", full_tag="[Block]"))
    assert measured(one_tag)["naive"] == measured(both)["naive"]
    assert measured(one_tag)["full-prefill"]["kl"] == 0


def test_measured_fidelity_has_all_methods_and_layers(engine):
    steps = []
    found = measured(engine, lambda: steps.append(1))
    assert len(steps) == 3
    assert found["full-prefill"]["kl"] == 0
    assert found["full-prefill"].keys() == {"kl", "top1", "tokens"}
    assert len(found["naive"]["values"]) == len(found["naive"]["entropy"]) == 2
    assert found["naive"]["kl"] > 0
    assert len(found["naive"]["choice"]["beginnings"]) == 2
    json.dumps(found, allow_nan=False)


def test_choices_and_their_overlap_are_worked_by_hand(tmp_path):
    keys = torch.tensor([[0.0, 0, 0, 1e-6], [4, 1, 2, 0], [0, 3, 4, 1]])
    away = Deviation(keys, keys, torch.tensor([0, 0, 1, 1]), torch.tensor([0, 9, 0, 9]))
    chosen = chosen_tokens(away, 0.5)
    assert not chosen.top[0].any()
    assert chosen.top[1:].tolist() == [[True, False, True, False], [False, True, True, False]]
    assert overlap_of(chosen).tolist() == [[0, 0, 0], [0, 1, 0.5], [0, 0.5, 1]]
    assert beginnings_of(chosen).tolist() == [0, 1, 0.5]
    assert cumulative_of(chosen.deviation)[1:].tolist() == [[4, 6, 7, 7], [4, 7, 8, 8]]
    said = choice_of(away, 0.5)
    assert (said["first_share"], said["constant"]) == (0.5, 0.5)  # the third token, of two
    assert said["accrued"][1:] == [6 / 7, 7 / 8]
    draw_deviation(chosen, tmp_path / "d.png", "d")
    draw_overlap(chosen, tmp_path / "o.png", "o")
    draw_cumulative({"naive": chosen.deviation}, tmp_path / "c.png", 1, "c")
    assert len(list(tmp_path.iterdir())) == 3


def test_moved_chunks_and_wrong_shares_are_refused(engine):
    away = deviation(engine, EXAMPLE, "naive", "full-prefill")
    with pytest.raises(ValueError, match="ratio must be a share"):
        chosen_tokens(away, 0)
    with pytest.raises(ValueError, match="other positions than full prefill"):
        chosen_tokens(away._replace(keys=None), 0.1)
    with pytest.raises(ValueError, match="keeps 0 context tokens"):
        deviation(engine, EXAMPLE, "no-context", "full-prefill")
