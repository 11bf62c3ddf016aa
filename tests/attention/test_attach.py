"""Attaching: with a layout a model attends by it, without one it is the stock model, alone."""

import copy
from unittest.mock import patch

import pytest
import torch
from families import FAMILIES, VOCAB, build
from layouts import LAYOUTS
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from blocktune import attach, block_attention, detach
from blocktune.attention import is_attached, make_plan
from blocktune.attention.interface import EXECUTIONS, planned_forward
from blocktune.attention.masks import DensePlan

IDS = torch.arange(1, 25).reshape(2, 12)


def rows(name="ragged"):
    some = LAYOUTS[name]()
    ids = torch.randint(1, VOCAB, some.kind.shape, generator=torch.Generator().manual_seed(0))
    return ids, some


@torch.no_grad()
def stock_outputs(model):
    """What a user asks of a stock model: plain, padded, packed, cached, generated."""
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    packed = torch.arange(12).remainder(5).expand(2, 12)
    first = model(IDS[:, :8], use_cache=True)
    return [
        model(IDS).logits,
        model(IDS, attention_mask=mask).logits,
        model(IDS, position_ids=packed, use_cache=False).logits,
        model(IDS[:, 8:], past_key_values=first.past_key_values).logits,
        model.generate(IDS, attention_mask=mask, max_new_tokens=4, do_sample=False),
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_layout_it_is_the_stock_model_to_the_bit(family):
    model = build(FAMILIES[family]())
    before, implementation = stock_outputs(model), model.config._attn_implementation
    attach(model)
    for own, attached in zip(before, stock_outputs(model), strict=True):
        assert torch.equal(own, attached)
    detach(model)
    assert model.config._attn_implementation == implementation
    assert not is_attached(model)
    assert torch.equal(model(IDS).logits, before[0])


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral"])
@pytest.mark.parametrize("wrapped", [False, True])
@torch.no_grad()
def test_a_layout_brings_its_plan_and_positions(family, wrapped):
    model = build(FAMILIES[family]())
    ids, some = rows("everything")
    attach(model)
    expected = model(
        ids, plan=make_plan("split", some), position_ids=some.position, use_cache=False
    ).logits
    if wrapped:
        model = get_peft_model(model, LoraConfig(target_modules="all-linear")).eval()
    for more in ({}, {"attention_mask": (~some.is_pad).long()}, {"labels": ids}):
        assert torch.equal(model(input_ids=ids, layout=some.pack(), **more).logits, expected)
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embeds, layout=some.pack()).logits, expected)
    assert (model(ids).logits - expected).abs().max() > 1e-2


@torch.no_grad()
def test_attaching_one_model_never_touches_another():
    config = FAMILIES["gemma2"]()
    one, other = type(build(config))(config).eval(), type(build(config))(config).eval()
    assert one.config is other.config
    named = (config._attn_implementation, other.config._attn_implementation)
    before = other(IDS).logits
    attach(one)
    assert (config._attn_implementation, other.config._attn_implementation) == named
    assert not is_attached(other)
    assert one.config is one.model.config
    assert torch.equal(other(IDS).logits, before)
    ids, some = rows()
    with block_attention(other):
        inside = other(ids, layout=some.pack()).logits
    assert not is_attached(other)
    assert is_attached(one)
    assert torch.equal(other(IDS).logits, before)
    attach(other)
    detach(one)
    assert torch.equal(other(ids, layout=some.pack()).logits, inside)


@torch.no_grad()
def test_a_copy_is_attached_on_its_own():
    model = build(FAMILIES["llama"]())
    attach(model)
    ids, some = rows()
    expected = model(ids, layout=some.pack()).logits
    twin = copy.deepcopy(model)
    detach(model)
    assert torch.equal(twin(ids, layout=some.pack()).logits, expected)
    detach(twin)
    assert torch.equal(twin(ids).logits, model(ids).logits)


def test_attaching_twice_is_attaching_once_by_the_last_execution():
    model = build(FAMILIES["llama"]())
    attach(model)
    with pytest.raises(ValueError, match="one of dense, flex, split, got 'flash'"):
        attach(model, "flash")
    attach(model, "dense")
    assert len(model.model._forward_pre_hooks) == 1
    with block_attention(model):
        assert is_attached(model)
    assert is_attached(model)
    masks = []
    with patch.dict(
        EXECUTIONS, {"dense": lambda layout: masks.append(layout) or DensePlan(layout)}
    ):
        ids, some = rows()
        model(ids, layout=some.pack())
    assert masks  # by the execution from before the block
    detach(model)
    detach(model)
    assert not model.model._forward_pre_hooks


def test_gradients_also_flow_when_layers_run_again():
    ids, some = rows()
    grads = []
    for checkpointing in (False, True):
        model = build(FAMILIES["llama"]()).train()
        attach(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(ids, layout=some.pack(), labels=ids).loss.backward()
        grads.append([p.grad for p in model.parameters()])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def test_what_would_lose_the_layout_is_refused():
    model = build(FAMILIES["llama"]())
    ids, some = rows()
    attach(model)
    with pytest.raises(ValueError, match=r"layout has \(1, 48\) rows, the input has \(1, 47\)"):
        model(ids[:, 1:], layout=some.pack())
    with pytest.raises(ValueError, match="leave attention_mask out"):
        model(ids, attention_mask=torch.zeros_like(ids), layout=some.pack())
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="set to 'sdpa' after attach"):
        model(ids, layout=some.pack())
    attach(model)
    assert model(ids, layout=some.pack()).logits.isfinite().all()


def test_an_implementation_that_cannot_be_kept_is_refused():
    config = FAMILIES["llama"]()
    model = AutoModelForCausalLM.from_config(config, attn_implementation="flex_attention")
    with pytest.raises(ValueError, match=r"got 'flex_attention'; .*attn_implementation='sdpa'"):
        attach(model)


@torch.no_grad()
def test_a_compiled_model_attends_by_the_layout():
    """Traced, a comparison with an enum member would be wrong, so plans are not traced."""
    model, (ids, some) = build(FAMILIES["llama"]()), rows()
    attach(model)
    inputs = {"layout": some.pack(), "attention_mask": (~some.is_pad).long()}
    expected = model(ids, **inputs).logits
    compiled = torch.compile(model, backend="eager")(ids, **inputs).logits
    torch.testing.assert_close(compiled, expected, rtol=0, atol=1e-5)


def test_a_cache_goes_by_the_name_that_the_version_of_transformers_gives_it():
    class Newer(torch.nn.Module):
        def forward(self, ids, cache=None, **others):
            return cache

    class Older(torch.nn.Module):
        def forward(self, ids, past_key_values=None, **others):
            return past_key_values

    held = object()
    for model in (Newer(), Older()):
        assert planned_forward(model, None, None, None, held) is held
