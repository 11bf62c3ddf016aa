"""A merged model answers as the adapter on its base does, and says how far it is off."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from training.runs import make_trainer, write_run
from training.toy import toy_examples
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from blocktune.adapter import OWN_WEIGHTS, AdapterInfo, attach_links
from blocktune.adapter.load import load_model
from blocktune.adapter.merge import merge_adapter
from blocktune.commands import app
from blocktune.engine import Engine
from blocktune.hub import CardFacts, prepare
from blocktune.links import installed_links, load_links
from blocktune.models.load import load_base
from blocktune.training.run import train

MODES = {
    "lora": {},
    "table": {"num_links": 2},
    "tokens": {"num_links": 2, "link_mode": "added_tokens"},
    "table alone": {"num_links": 2, "freeze_base": True, "use_peft": False},
}
METHOD = {"lora": "block-attention"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Mode -> folder of a run; each is trained once."""
    done = {}

    def get(mode):
        if mode not in done:
            done[mode] = tmp_path_factory.mktemp("run")
            trainer = make_trainer(done[mode], **MODES[mode])
            trainer.train()
            trainer.save_model()
        return done[mode]

    return get


def answers(engine, mode):
    return engine.next_logits(toy_examples(2), METHOD.get(mode, "kvlink"))


@pytest.mark.parametrize("mode", MODES)
def test_a_merged_model_serves_as_the_adapter_did(trained, tmp_path, mode):
    run = trained(mode)
    report = merge_adapter(run / "out", tmp_path / "merged")
    assert report.max_abs_diff < 1e-5
    assert report.same_top1 == 1.0
    assert report.requantised_max_abs_diff is None
    assert not list((tmp_path / "merged").glob("adapter_*"))

    apart = answers(Engine.from_pretrained(str(run / "base"), run / "out"), mode)
    engine = Engine.from_pretrained(adapter=tmp_path / "merged")
    assert engine.adapter.base_model == OWN_WEIGHTS
    width = apart.shape[-1]
    torch.testing.assert_close(answers(engine, mode)[:, :width], apart, rtol=0, atol=1e-5)


def test_a_table_travels_beside_the_model_exactly(trained, tmp_path):
    merge_adapter(trained("table") / "out", tmp_path / "merged")
    before, after = (load_links(f) for f in (trained("table") / "out", tmp_path / "merged"))
    assert torch.equal(before.weight, after.weight)


@pytest.mark.parametrize("mode", ["table", "tokens"])
def test_rows_in_the_vocabulary_are_the_trained_ones(trained, tmp_path, mode):
    run, merged = trained(mode), tmp_path / "merged"
    assert merge_adapter(run / "out", merged, links="added_tokens").link_mode == "added_tokens"
    tokenizer = AutoTokenizer.from_pretrained(merged)
    ids = tokenizer.convert_tokens_to_ids(["<|link_0|>", "<|link_1|>"])
    stock = AutoModelForCausalLM.from_pretrained(merged)
    rows = stock.get_input_embeddings().weight[ids]
    if mode == "table":
        assert torch.equal(rows, load_links(run / "out").weight)
    else:
        weights = load_file(run / "out/adapter_model.safetensors")
        [kept] = [weight for name, weight in weights.items() if "trainable_tokens" in name]
        assert torch.equal(rows, kept)
    assert answers(Engine.from_pretrained(adapter=merged), mode).isfinite().all()


def test_a_four_bit_base_is_merged_into_its_codes_and_the_loss_is_said(tmp_path):
    trainer = make_trainer(tmp_path, num_links=2, load_in_4bit=True, dtype="float32")
    trainer.train()
    trainer.save_model()
    report = merge_adapter(tmp_path / "out", tmp_path / "merged")
    assert report.quantization == "nf4"
    assert report.max_abs_diff < 1e-4
    assert report.requantised_max_abs_diff > 100 * report.max_abs_diff
    loaded = load_model(adapter=tmp_path / "merged")
    assert all(weight.is_floating_point() for weight in loaded.model.parameters())
    assert loaded.info.quantization is None


def test_a_base_that_is_saved_quantised_is_merged_and_published_too(tmp_path):
    """As Unsloth publishes bases: nobody has to quantise them, and nobody can."""
    path = write_run(tmp_path, max_steps=1)
    base, tokenizer = load_base(str(tmp_path / "base"), quantize="nf4", device="cpu")
    for part in (base, tokenizer):
        part.save_pretrained(tmp_path / "base")
    train(["--config", str(path)])
    facts = CardFacts(base_model="org/base-bnb-4bit", license="mit")
    files = prepare(tmp_path / "out", "me/mine", facts, device="cpu")
    assert b"--quantize" not in files["README.md"]
    report = merge_adapter(tmp_path / "out", tmp_path / "merged", device="cpu")
    assert report.quantization == "nf4"
    assert report.max_abs_diff < 1e-4
    loaded = load_model(adapter=tmp_path / "merged", device="cpu").model
    assert all(weight.is_floating_point() for weight in loaded.parameters())


def test_a_base_that_was_moved_is_named_with_its_adapter(trained, tmp_path):
    shutil.copytree(trained("lora"), tmp_path / "run")
    info = AdapterInfo.load(tmp_path / "run/out")
    replace(info, base_model=str(tmp_path / "gone")).save(tmp_path / "run/out")
    words = r"cannot load the base of adapter '.*out' \(--model takes another copy\) from '.*gone'"
    with pytest.raises(ValueError, match=words):
        load_model(adapter=tmp_path / "run/out")
    with pytest.raises(ValueError, match=words):
        merge_adapter(tmp_path / "run/out", tmp_path / "merged")
    merge_adapter(tmp_path / "run/out", tmp_path / "merged", model=str(tmp_path / "run/base"))


def test_what_cannot_be_merged_is_refused(trained, tmp_path):
    out = trained("tokens") / "out"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("")
    with pytest.raises(ValueError, match="is not empty; name a new folder"):
        merge_adapter(out, tmp_path / "full")
    with pytest.raises(ValueError, match="were trained in the vocabulary; leave out --links"):
        merge_adapter(out, tmp_path / "new", links="table")
    with pytest.raises(ValueError, match="links must be 'table' or 'added_tokens', got 'no'"):
        merge_adapter(out, tmp_path / "new", links="no")
    with pytest.raises(ValueError, match="no learned tokens; leave out --links added_tokens"):
        merge_adapter(trained("lora") / "out", tmp_path / "new", links="added_tokens")
    merge_adapter(out, tmp_path / "merged")
    with pytest.raises(ValueError, match="is a full model already"):
        merge_adapter(tmp_path / "merged", tmp_path / "again")


@pytest.mark.parametrize("mode", ["lora", "table", "tokens"])
def test_stock_peft_and_one_call_serve_an_adapter(trained, mode):
    run = trained(mode)
    model = AutoPeftModelForCausalLM.from_pretrained(str(run / "out"))
    info = attach_links(model, run / "out")
    tokenizer = AutoTokenizer.from_pretrained(run / "out")
    assert info == AdapterInfo.load(run / "out")
    assert (installed_links(model) is not None) == info.has_table
    stock = Engine(model, tokenizer, adapter=info, adapter_folder=run / "out")
    ours = Engine.from_pretrained(str(run / "base"), run / "out")
    width = len(AutoTokenizer.from_pretrained(run / "base"))
    torch.testing.assert_close(
        answers(stock, mode)[:, :width], answers(ours, mode)[:, :width], rtol=0, atol=1e-5
    )


def test_the_command_says_what_merging_cost(trained, tmp_path):
    command = ["merge", str(trained("table") / "out"), "--output", str(tmp_path / "merged")]
    done = CliRunner().invoke(app, [*command, "--json"])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["max_abs_diff"] < 1e-5
    assert (report["link_mode"], report["quantization"]) == ("table", None)
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 2
    assert "is not empty; name a new folder" in again.stderr
