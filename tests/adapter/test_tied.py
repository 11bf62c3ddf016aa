"""LoRA on one of two tied weights: served, merged and saved, it changes that one alone."""

import pytest
import torch
from peft import PeftModel
from training.runs import write_run
from training.toy import toy_examples
from transformers import AutoModelForCausalLM, AutoTokenizer

from blocktune import Engine
from blocktune.adapter import load
from blocktune.adapter.merge import merge_adapter
from blocktune.check import check_adapter
from blocktune.methods import build
from blocktune.training.run import train

TARGETS = {
    "lora": {"lora_target_modules": ["q_proj", "v_proj", "embed_tokens"]},
    "modules_to_save": {"lora_modules_to_save": ["embed_tokens"]},
}


@pytest.fixture(scope="module", params=TARGETS)
def trained(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tied")
    path = write_run(folder, learning_rate=0.1, **TARGETS[request.param])
    assert AutoModelForCausalLM.from_pretrained(folder / "base").config.tie_word_embeddings
    train(["--config", str(path)])
    return folder


def peft_logits(folder, engine, example):
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    model = PeftModel.from_pretrained(model, folder / "out").eval()
    pieces = engine.prompts.pieces(example, build("full-prefill"))
    ids = [*pieces.prefix, *(i for chunk in pieces.chunks for i in chunk), *pieces.query]
    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=False).logits[:, -1]


def test_served_and_merged_as_peft_runs_it(trained, tmp_path):
    (example,) = toy_examples(1)
    engine = Engine.from_pretrained(adapter=trained / "out", device="cpu")
    wanted = peft_logits(trained, engine, example)
    served = engine.next_logits([example], "full-prefill")
    torch.testing.assert_close(served, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
    report = merge_adapter(trained / "out", tmp_path / "merged", device="cpu")
    assert report.max_abs_diff < 1e-5 * report.max_abs_logit
    again = Engine.from_pretrained(adapter=tmp_path / "merged", device="cpu")
    merged = again.next_logits([example], "full-prefill")
    torch.testing.assert_close(merged, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not torch.equal(stock.lm_head.weight, stock.model.embed_tokens.weight)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")


def test_the_check_compares_with_stock_peft(trained, monkeypatch):
    name = "full prefill = stock PEFT"
    how = {"dtype": "float32", "device": "cpu"}
    checks = {one.name: one for one in check_adapter(None, trained / "out", **how)}
    assert checks[name].passed
    monkeypatch.setattr(load, "_merged", lambda model: _with_a_scaled_head(model))
    broken = {one.name: one for one in check_adapter(None, trained / "out", **how)}
    assert not broken[name].passed
    assert all(one.passed for one in broken.values() if one.name != name)


def _with_a_scaled_head(model):
    merged = model.merge_and_unload()
    merged.lm_head.weight = torch.nn.Parameter(1.5 * merged.lm_head.weight.detach())
    return merged
