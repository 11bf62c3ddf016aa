"""One flag that makes methods spend alike."""

import pytest
from engine.served import ASK, engine_of
from engine.test_selection import deep

from blocktune.methods import build_entry, compose
from blocktune.methods.select import Deviation, FirstK, GradualDeviation, LayerRange, matched


@pytest.fixture(scope="module")
def engine(tokenizer):
    return engine_of(deep("llama"), tokenizer)


@pytest.mark.parametrize(
    "name", ["cacheblend", "cacheblend-paper", "epic", "random", "query-attention", "oracle"]
)
def test_methods_at_one_layer_budget_spend_it(engine, name):
    method = build_entry({"name": name, "layer_budget": 0.4})
    assert method.name == f"{name} at 40.0% of the layer-tokens"
    usage = engine.answer([ASK], method, max_new_tokens=1)[0].usage
    assert usage.recompute_ratio == pytest.approx(0.4, abs=0.04)  # whole tokens of each chunk


@pytest.mark.parametrize(
    ("selection", "share", "layers"),
    [
        (Deviation(), 0.25, 4),  # the first layer in full, and nothing chosen after it
        (GradualDeviation(), 0.9, 4),  # its first shares are at 1 already
        (LayerRange(), 0.25, 4),
        (LayerRange(), 0.5, 4),
        (FirstK(), 0.15, 4),
    ],
)
def test_a_matched_selector_spends_the_share(selection, share, layers):
    assert matched(selection, share, layers).spends(layers) == pytest.approx(share, abs=0.005)


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (LayerRange(), "spends 0.250 or 0.500, and nothing between"),
        (Deviation(of="cached"), "spends what the prompt decides"),
    ],
)
def test_a_share_that_cannot_be_met_is_refused(selection, message):
    with pytest.raises(ValueError, match=message):
        matched(selection, 0.4, 4)


def test_a_layer_budget_below_the_first_layers_is_refused_before_anything_runs(engine):
    with pytest.raises(ValueError, match=r"0.2 of the layer-tokens cannot .* 0.250 to 1.000"):
        engine.answer([ASK], compose("cacheblend", layer_budget=0.2))
    with pytest.raises(ValueError, match="budget and layer_budget exclude each other; drop one"):
        compose("cacheblend", budget=0.1, layer_budget=0.3)
    with pytest.raises(ValueError, match=r"layer_budget must be a share .*, got 15"):
        compose("cacheblend", layer_budget=15)
