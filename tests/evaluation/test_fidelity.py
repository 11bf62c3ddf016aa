"""Closeness to full prefill: zero where nothing differs, by hand where it can be."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from engine.served import ASK, engine_of
from families import FAMILIES

from blocktune.data import RagExample
from blocktune.evaluation.fidelity import agreement, forced_logits, measure_fidelity
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


@pytest.mark.parametrize("wrong", [0, 1])
def test_what_is_no_number_does_not_agree(wrong):
    logits = [torch.zeros(2, 3), torch.zeros(2, 3)]
    logits[wrong][1] = math.nan
    with pytest.raises(ValueError, match="logits are not numbers"):
        agreement(*logits)


def test_a_divergence_that_is_no_number_is_not_0():
    excluded = torch.tensor([[0.0, 0.0, -math.inf]])
    own = torch.tensor([[math.log(3.0), 0.0, -math.inf]])
    assert agreement(excluded, own).kl == pytest.approx(0.5 * math.log(4 / 3))
    for wrong in (torch.tensor([[0.0, math.inf, 0.0]]), excluded):
        with pytest.raises(ValueError, match=r"must be a finite number, got (nan|inf)"):
            agreement(torch.zeros(1, 3), wrong)


def test_full_prefill_agrees_with_itself_and_naive_reuse_does_not(engine):
    oracle, naive = build("full-prefill"), build("naive")
    ids, wanted = forced_logits(engine.prefilled([EXAMPLE], oracle), 3)
    assert 1 <= len(ids) <= 3
    again, same = forced_logits(engine.prefilled([EXAMPLE], oracle), 3, ids)
    assert again == ids
    assert torch.equal(same, wanted)
    _, other = forced_logits(engine.prefilled([EXAMPLE], naive), 3, ids)
    assert agreement(wanted, other).kl > 1e-3


def test_forced_logits_are_those_of_the_tokens_that_were_forced(engine):
    ids, logits = engine.continued_logits(EXAMPLE, "naive", 2)
    _, forced = forced_logits(engine.prefilled([EXAMPLE], build("naive")), 3, [*ids, 0])
    torch.testing.assert_close(forced[2:], logits.float())


def measured(engine):
    names = ("full-prefill", "naive", "no-context", "cache-craft warm_up=1")
    methods = {name: build(name) for name in names}
    specs = [SimpleNamespace(label=name) for name in methods]
    task, fidelity = object(), SimpleNamespace(num=1, tokens=2)
    suite = SimpleNamespace(methods=specs, tasks=[task], fidelity=fidelity)
    ready = SimpleNamespace(
        suite=suite,
        methods=methods,
        engine=lambda spec, task: engine,
        of=lambda task, limit: [EXAMPLE][:limit],
    )
    return measure_fidelity(ready, lambda pairs, description: pairs)


def test_the_tag_of_a_mode_is_no_loss_of_fidelity(engine):
    """Full prefill reads the tag that the method reads, so that chunks stand where its own do."""
    one_tag = engine.reworded(PromptFormat(block_tag="[Block]"))
    both = engine.reworded(PromptFormat(block_tag="[Block]", full_tag="[Block]"))
    assert measured(one_tag)["naive"] == measured(both)["naive"]
    assert measured(one_tag)["full-prefill"]["kl"] == 0


def test_measured_fidelity_has_all_methods(engine):
    found = measured(engine)
    assert found["full-prefill"]["kl"] == 0
    assert found["full-prefill"].keys() == {"kl", "top1", "tokens"}
    assert found["naive"]["kl"] > 0
    assert found["cache-craft warm_up=1"]["kl"] > 0  # not of the prompt without its history
    json.dumps(found, allow_nan=False)
