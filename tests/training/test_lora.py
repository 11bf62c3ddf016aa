"""LoRA added inside the product is PEFT's LoRA: the same outputs, gradients and files."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear
from training.toy import toy_model

from blocktune.training.lora import AddedLora


def adapted(base, added, **options):
    config = LoraConfig(r=4, lora_alpha=12, target_modules="all-linear", **options)
    if added:
        config._register_custom_module({torch.nn.Linear: AddedLora})
    torch.manual_seed(1)
    model = get_peft_model(base, config)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.2)
    return model


def both(**options):
    base = toy_model()
    return [adapted(copy.deepcopy(base), added, **options) for added in (True, False)]


def gradients(model, ids):
    loss = model(ids, attention_mask=torch.ones_like(ids)).logits.square().mean()
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}])
def test_added_lora_matches_pefts_outputs_and_gradients(options):
    own, theirs = both(**options)
    assert any(type(module) is AddedLora for module in own.modules())
    assert not any(type(module) is AddedLora for module in theirs.modules())
    ids = torch.randint(3, 60, (2, 9))
    (loss, found), (expected, wanted) = gradients(own, ids), gradients(theirs, ids)
    torch.testing.assert_close(loss, expected)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def test_an_adapter_that_is_off_or_merged_leaves_the_base_as_it_is():
    own, theirs = both()
    ids = torch.randint(3, 60, (2, 9))
    with torch.no_grad(), own.disable_adapter(), theirs.disable_adapter():
        torch.testing.assert_close(own(ids).logits, theirs(ids).logits, rtol=0, atol=0)
    with torch.no_grad():
        expected = own(ids).logits
        merged = own.merge_and_unload()(ids).logits
        # Two ways to round the same sum: within 1e-5 of the largest logit, some 5 here.
        torch.testing.assert_close(merged, expected, rtol=0, atol=1e-5 * expected.abs().max())


def test_the_saved_adapter_is_stock_peft(tmp_path):
    own, _ = both()
    own.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(toy_model(), tmp_path)
    assert {type(module) for module in loaded.modules() if isinstance(module, Linear)} == {Linear}
    ids = torch.randint(3, 60, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, own(ids).logits)


@pytest.mark.parametrize("why", ["dropout", "autocast", "sharded"])
def test_what_is_not_plain_goes_pefts_way(why, monkeypatch):
    own, _ = both(**({"lora_dropout": 0.5} if why == "dropout" else {}))
    layer = next(module for module in own.modules() if type(module) is AddedLora)
    calls, theirs = [], Linear.forward
    monkeypatch.setattr(Linear, "forward", lambda *a, **k: calls.append(1) or theirs(*a, **k))
    if why == "sharded":
        layer.lora_B["default"].weight.placements = ()
    with torch.autocast("cpu", torch.bfloat16, enabled=why == "autocast"):
        layer(torch.randn(2, 3, layer.in_features))
    assert calls == [1]
