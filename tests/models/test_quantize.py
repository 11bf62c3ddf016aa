"""Quantised bases: loaded, served, trained on and named, on a CPU."""

import pytest
import torch
from training.runs import make_trainer, write_run
from training.toy import save_toy, toy_examples

from blocktune.adapter import AdapterInfo
from blocktune.adapter.load import load_model
from blocktune.cache import model_fingerprint
from blocktune.check import check_model
from blocktune.data.example import write_jsonl
from blocktune.engine import Engine
from blocktune.models.identity import QUANTISED, base_fingerprint, same_base
from blocktune.models.load import load_base
from blocktune.models.quantize import quantization_of
from blocktune.training.run import build, parse, train

IDS = torch.arange(10, 40)[None]
QLORA = {"load_in_4bit": True, "dtype": "float32"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_toy(tmp_path_factory.mktemp("base"))


def logits(model):
    """Without a layout: under the model's own attention."""
    with torch.no_grad():
        return model.eval()(IDS, use_cache=False).logits


@pytest.mark.parametrize("name", ["nf4", "nf4-double", "int8"])
def test_a_base_is_quantised_as_it_loads(base, name):
    plain, _ = load_base(base)
    model, _ = load_base(base, quantize=name)
    assert quantization_of(model) == name
    assert quantization_of(plain) is None
    stored = model.model.layers[0].mlp.up_proj.weight
    assert stored.dtype == (torch.int8 if name == "int8" else torch.uint8)
    rows = torch.stack([logits(model).flatten(), logits(plain).flatten()])
    assert (rows[0] - rows[1]).abs().max() > 1e-3
    assert torch.corrcoef(rows)[0, 1] > (0.99 if name == "int8" else 0.5)


@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_a_quantised_checkpoint_loads_where_it_belongs(base, tmp_path, name):
    model, tokenizer = load_base(base, quantize=name)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, _ = load_base(str(tmp_path), device="cpu")
    assert quantization_of(again) == name
    torch.testing.assert_close(logits(again), logits(model))
    with pytest.raises(ValueError, match=r"is saved quantized .*'nf4'"):
        load_base(str(tmp_path), quantize="nf4")


def test_an_unknown_quantization_is_one_line(base):
    with pytest.raises(ValueError, match=r"quantize must be one of nf4, .* got 'int3'") as caught:
        load_base(base, quantize="int3")
    assert "\n" not in str(caught.value)


def test_four_bit_weights_stay_as_stored(base):
    model, tokenizer = load_base(base, quantize="nf4")
    before = model_fingerprint(model, None, tokenizer, {})
    quiet = logits(model)
    assert model_fingerprint(model, None, tokenizer, {}) == before
    torch.testing.assert_close(quiet, model(IDS, use_cache=False).logits.detach())  # with gradients


def test_a_cache_is_named_after_the_quantization(base):
    names = (None, "nf4", "nf4-double", "int8")
    loaded = [load_base(base, quantize=name) for name in names]
    assert len({model_fingerprint(m, None, t, {}) for m, t in loaded}) == len(names)


def test_a_base_is_known_again_when_it_is_quantised(base):
    plain, _ = load_base(base)
    for name in ("nf4", "int8"):
        model, _ = load_base(base, quantize=name)
        assert base_fingerprint(model).endswith(QUANTISED)
        assert same_base(base_fingerprint(model), base_fingerprint(plain))


def test_cached_chunks_match_the_dense_mask_on_four_bits(base):
    engine = Engine.from_pretrained(base, quantize="nf4")
    examples = toy_examples(3)
    together = engine.next_logits(examples, "naive")
    alone = torch.cat([engine.next_logits([example], "naive") for example in examples])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_reuse_is_sound_on_a_quantised_base(base, name):
    checks = check_model(Engine.from_pretrained(base, quantize=name))
    assert [one.name for one in checks if not one.passed] == []
    # 8-bit activations differ between a chunk alone and among others; 4-bit weights do not.
    cached = next(one for one in checks if one.name == "cached chunks = dense mask")
    assert (cached.max_abs_diff < 1e-5) is (name == "nf4")


@pytest.mark.parametrize("links", [{}, {"link_mode": "added_tokens"}])
def test_qlora_with_links_reloads_to_the_same_logits(tmp_path, links):
    trainer = make_trainer(tmp_path, num_links=2, **QLORA, **links)
    before = logits(trainer.model).clone()
    trainer.train()
    trainer.save_model()
    trained = logits(trainer.model)
    assert (trained - before).abs().max() > 1e-3
    info = AdapterInfo.load(tmp_path / "out")
    assert info.quantization == "nf4"
    assert info.rope["rope_type"] == "default"
    loaded = load_model(str(tmp_path / "base"), tmp_path / "out", quantize="nf4")
    torch.testing.assert_close(logits(loaded.model), trained, rtol=0, atol=1e-5)


def test_evaluating_does_not_change_what_is_trained(tmp_path):
    def losses(folder, **more):
        path = write_run(folder, **QLORA, **more)
        write_jsonl(folder / "eval.jsonl", toy_examples(4))
        trainer = build(*parse(["--config", str(path)]))
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    evaluated = {"eval_strategy": "steps", "eval_steps": 1}
    source = str(tmp_path / "b" / "eval.jsonl")
    plain = losses(tmp_path / "a")
    assert losses(tmp_path / "b", eval_data=source, **evaluated) == plain


def test_a_quantised_base_needs_a_dtype(tmp_path):
    path = write_run(tmp_path, load_in_4bit=True, dtype="auto")
    with pytest.raises(ValueError, match="a quantized base needs a dtype"):
        train(["--config", str(path)])
