"""Decoding on transformers' own layers: quantised, in a window, offloaded."""

import copy
from importlib.util import find_spec

import pytest
import torch
from engine.served import ASK, FORMAT, SHORT
from tiny_llama import tiny_llama
from transformers import LlamaForCausalLM, cache_utils
from transformers.cache_utils import DynamicSlidingWindowLayer, Fp8QuantizedLayer

from blocktune.cache.decode_cache import LAYERS, DecodeCache
from blocktune.engine import Engine
from blocktune.methods import build


@pytest.fixture(scope="module")
def engine(tokenizer):
    return Engine(tiny_llama(tokenizer, 512, initializer_range=0.2), tokenizer, format=FORMAT)


def ids(engine, ask=ASK, count=24, method="cacheblend"):
    return engine.answer([ask], method, max_new_tokens=count)[0].token_ids


def test_a_window_wider_than_the_answer_changes_nothing(engine):
    assert ids(engine.decoding_on("sliding:500")) == ids(engine)


def test_a_window_hides_what_is_older(engine):
    """As one dense forward over the last tokens of the cache, whose keys stay where they are."""
    window, other = 8, engine.decoding_on("sliding:8")
    run = other.start([other.prompts.pieces(ASK, build("full-prefill"))], "full-prefill")
    (first, second), logits = run.continued(2)
    layers = run.cache.layers
    assert all(isinstance(layer, DynamicSlidingWindowLayer) for layer in layers)
    assert {layer.keys.shape[2] for layer in layers} == {window - 1}
    pieces = engine.prompts.pieces(ASK, build("full-prefill"))
    prompt = [*pieces.context, *pieces.query]
    whole = torch.tensor([[*prompt, first, second]])
    size = whole.shape[1]
    age = torch.arange(size)[:, None] - torch.arange(size)
    # The prompt sees all; decoded rows see the window.
    seen = (age >= 0) & ((age < window) | (torch.arange(size) < len(prompt))[:, None])
    stock = LlamaForCausalLM(copy.deepcopy(engine.model.config))
    stock.load_state_dict(engine.model.state_dict())
    stock.set_attn_implementation("eager")
    mask = torch.zeros(1, 1, size, size).masked_fill(~seen, torch.finfo(torch.float32).min)
    with torch.no_grad():
        wanted = stock.eval()(whole, attention_mask=mask).logits[:, -1]
    torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-5)
    full = engine.continued_logits(ASK, "full-prefill", 2)[1]
    assert (full - wanted).abs().max() > 1e-3


def test_eight_bits_take_a_quarter_and_stay_close(engine):
    other = engine.decoding_on("fp8")
    runs = [
        one.start([one.prompts.pieces(ASK, build("naive"))], "naive") for one in (engine, other)
    ]
    (tokens, wanted), (_, logits) = [run.continued(1) for run in runs]
    assert len(tokens) == 1
    layers = runs[1].cache.layers
    assert all(isinstance(layer, Fp8QuantizedLayer) for layer in layers)
    plain = runs[0].cache.layers[0].keys
    held = layers[0]._quantized_keys[0]
    assert held.shape == plain.shape
    assert 4 * held.nbytes == plain.nbytes
    error = (logits - wanted).norm() / wanted.norm()
    assert 0 < error < 0.2


def test_four_bits_of_a_package_stay_close(engine):
    other = engine.decoding_on("hqq")
    run = other.start([other.prompts.pieces(ASK, build("naive"))], "naive")
    plain = engine.start([engine.prompts.pieces(ASK, build("naive"))], "naive")
    (_, logits), (_, wanted) = run.continued(1), plain.continued(1)
    assert {type(layer).__name__ for layer in run.cache.layers} == {LAYERS["hqq"]}
    assert 0 < (logits - wanted).norm() / wanted.norm() < 0.5
    assert len(ids(other, count=200, method="naive")) > 0  # past the 128 tokens that stay whole


def test_a_batch_of_both_lengths_decodes_as_alone(engine):
    for kind in ("fp8", "sliding:16"):
        other = engine.decoding_on(kind)
        together = other.answer([SHORT, ASK], "naive", max_new_tokens=6)
        if kind == "fp8":  # one scale for all prompts of a batch
            assert [len(answer.token_ids) for answer in together]
            continue
        alone = [ids(other, ask, 6, "naive") for ask in (SHORT, ASK)]
        assert [answer.token_ids for answer in together] == alone


def test_a_window_refuses_a_reshape(engine):
    with pytest.raises(ValueError, match="by a method without a reshape"):
        ids(engine.decoding_on("sliding:16"), method="ape")
    assert ids(engine.decoding_on("fp8"), method="ape")


@pytest.mark.parametrize("text", ["sliding", "sliding:1", "sliding:x", "fp8:1", "fp8:3", "int3"])
def test_an_unknown_kind_is_refused(text):
    with pytest.raises(ValueError, match=r"one of sliding:TOKENS \(2 or more\), fp8") as error:
        DecodeCache.parse(text)
    assert text in str(error.value)


def test_an_extension_that_cannot_be_compiled_is_refused_in_one_line(monkeypatch):
    class Layer:
        def __init__(self, **_):
            pass

        def update(self, keys, values):
            raise RuntimeError("Ninja is required to load C++ extensions\nmore")

    monkeypatch.setattr(cache_utils, LAYERS["quanto"], Layer)
    with pytest.raises(ValueError, match="C\\+\\+ compiler and ninja, or use fp8") as error:
        DecodeCache("quanto")
    assert "\n" not in str(error.value)


def test_what_is_not_there_is_refused_in_one_line():
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="moves keys off a GPU, and there is none"):
            DecodeCache("offloaded")
    if find_spec("hqq") is None:
        with pytest.raises(ValueError, match="decode cache 'hqq' cannot be used here: You need"):
            DecodeCache("hqq")
