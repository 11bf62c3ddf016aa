"""Reshaped attention is in the usage as it was executed, surveys and passes ahead included."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from engine.served import ASK, engine_of
from families import FAMILIES

from blocktune.methods import build, compose
from blocktune.methods import reshaped_attention as executing

METHODS = {
    "ape": build("ape"),
    "psr": build("psr"),
    "sel": build("sel"),
    "sel LHT": build("sel", aggregation="LHT"),
    "sel over epic": compose("epic", reshape={"top-chunks": {"aggregation": "none"}}),
}


@pytest.fixture
def executed(monkeypatch):
    """Multiply-adds of matrices and attention, as they happen."""
    counted: Counter = Counter()
    sdpa = F.scaled_dot_product_attention

    def attend(query, key, value, is_causal=False, **more):
        groups, heads, rows, dim = query.shape
        pairs = rows * (rows + 1) // 2 if is_causal else rows * key.shape[2]
        counted["fused"] += groups * heads * pairs * (dim + value.shape[3])
        return sdpa(query, key, value, is_causal=is_causal, **more)

    def counting(function):
        def call(left, right, *more):
            groups, heads, rows = left.shape[:3]
            counted[function.__name__] += groups * heads * rows * right.shape[2] * right.shape[3]
            return function(left, right, *more)

        return call

    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    monkeypatch.setattr(executing, "plain_scores", counting(executing.plain_scores))
    monkeypatch.setattr(executing, "weighted_values", counting(executing.weighted_values))
    return counted


@pytest.mark.parametrize("name", METHODS)
def test_flops_are_what_was_executed(tokenizer, executed, name):
    engine = engine_of(FAMILIES["llama"](), tokenizer)
    engine.answer([ASK], METHODS[name], max_new_tokens=1)  # encodes the chunks

    def count(module, args, output):
        rows = args[0].numel() // module.in_features
        executed["matrices"] += rows * module.in_features * module.out_features

    for module in engine.model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(count)
    executed.clear()
    usage = engine.answer([ASK], METHODS[name], max_new_tokens=1)[0].usage
    assert usage.flops == 2 * sum(executed.values())
    surveyed = executed["plain_scores"] > executed["weighted_values"] > 0
    assert surveyed == METHODS[name].reshape().surveys
