"""GGUF files and multimodal models: what is loaded is the text model, with its own weights."""

import json

import gguf
import numpy as np
import pytest
import torch
from families import BASE, build
from safetensors.torch import load_file, save_file
from training.toy import toy_tokenizer
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Qwen2Config,
)

from blocktune.engine import Engine
from blocktune.models.identity import base_fingerprint
from blocktune.models.load import load_base, read_tokenizer

QUESTION = {"question": "Where was she born?", "chunks": ["She was born there.", "He was not."]}
NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
PARTS = {
    **{f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"},
    **{f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")},
    "self_attn.o_proj": "attn_output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(path, model, tokenizer):
    """A Qwen2 model in the format of llama.cpp, in float32."""
    config, writer = model.config, gguf.GGUFWriter(path, "qwen2")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types([gguf.TokenType.NORMAL] * len(vocabulary))
    writer.add_token_scores([0.0] * len(vocabulary))
    writer.add_eos_token_id(tokenizer.eos_token_id)
    for name, weight in model.state_dict().items():
        if name not in NAMES:
            _, _, layer, *part, kind = name.split(".")
            NAMES[name] = f"blk.{layer}.{PARTS['.'.join(part)]}.{kind}"
        writer.add_tensor(NAMES[name], weight.numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_or_its_folder_is_dequantised_once_and_served(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "hub"))
    tokenizer = toy_tokenizer()
    model = build(Qwen2Config(**BASE | {"vocab_size": len(tokenizer)}))
    folder = tmp_path / "g"
    folder.mkdir()
    write_gguf(folder / "tiny.gguf", model, tokenizer)
    for name in (folder / "tiny.gguf", folder):
        loaded, _ = load_base(str(name), device="cpu")
        ids = torch.arange(3, 30)[None]
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=1e-5)
        assert loaded.config._name_or_path == str(name)
        assert base_fingerprint(loaded) == base_fingerprint(model)  # epsilon is float32 in GGUF
    assert caplog.text.count("dequantizing tiny.gguf once, into") == 1
    [kept] = (tmp_path / "hub/blocktune/gguf").iterdir()
    assert (kept / "model.safetensors").is_file()
    write_gguf(folder / "tiny.gguf", build(model.config, seed=1), tokenizer)  # another content
    changed, _ = load_base(str(folder), device="cpu")
    assert not torch.allclose(changed(ids).logits, model(ids).logits)
    (folder / "other.gguf").touch()
    with pytest.raises(ValueError, match=r"several GGUF files \(other.gguf, tiny.gguf\)"):
        load_base(str(folder), device="cpu")
    with pytest.raises(ValueError, match=r"no GGUF file .*absent.gguf"):
        load_base(str(folder / "absent.gguf"), device="cpu")


def in_config(**changes):
    """Changes the configuration of a folder."""

    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def without_a_weight(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


DAMAGED = {
    "a weight is gone": (without_a_weight, "lack 1 weights, such as model.layers.1.mlp.up_proj"),
    "more layers": (
        in_config(num_hidden_layers=3, layer_types=["full_attention"] * 3),
        r"lack \d+ weights, such as model.layers.2",
    ),
    "no layers": (
        in_config(num_hidden_layers=0, layer_types=[]),
        "num_hidden_layers of its configuration is 0",
    ),
    "other shapes": (in_config(intermediate_size=64), "have other shapes than its configuration"),
    "a wrong type": (in_config(num_hidden_layers="2"), "cannot load a language model from"),
    "heads that do not divide": (in_config(num_attention_heads=3), "have other shapes"),
    "an unknown dtype": (in_config(dtype="float31"), "no attribute 'float31'"),
    "an unknown rope": (in_config(rope_parameters={"rope_type": "x"}), "correct config.json"),
    "no context": (in_config(max_position_embeddings=1), "a context of 1 tokens holds no chunks"),
    "a codec that is not installed": (
        in_config(quantization_config={"quant_method": "gptq", "bits": 4}),
        "GPTQ quantized model requires",
    ),
    "half a generation config": (
        lambda folder: (folder / "generation_config.json").write_text('{"eos'),
        "generation_config.json: not JSON",
    ),
    "words for stop tokens": (
        lambda folder: (folder / "generation_config.json").write_text('{"eos_token_id": ["</s>"]}'),
        "eos_token_id of its generation config must be token ids",
    ),
    "code of its own": (
        in_config(model_type="own", auto_map={"AutoConfig": "configuration_own.Own"}),
        "needs code from its own repository",
    ),
    "null": (lambda folder: (folder / "config.json").write_text("null"), "cannot load"),
    "half a tokenizer": (
        lambda folder: (folder / "tokenizer.json").write_text('{"version'),
        "cannot load a tokenizer from",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_model_is_refused_in_one_line(tmp_path, name):
    change, message = DAMAGED[name]
    tokenizer = toy_tokenizer()
    build(Qwen2Config(**BASE | {"vocab_size": len(tokenizer)})).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    change(tmp_path)
    with pytest.raises(ValueError, match=message) as refusal:
        load_base(str(tmp_path), device="cpu")
    assert "\n" not in str(refusal.value)


def test_weights_that_have_no_place_are_told(tmp_path, caplog):
    tokenizer = toy_tokenizer()
    build(Qwen2Config(**BASE | {"vocab_size": len(tokenizer)})).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    in_config(num_hidden_layers=1, layer_types=["full_attention"])(tmp_path)
    load_base(str(tmp_path), device="cpu")
    assert "weights are not used, such as model.layers.1" in caplog.text


def test_of_a_multimodal_model_the_text_model_is_served(tmp_path):
    tokenizer = toy_tokenizer()
    text = {**BASE, "vocab_size": len(tokenizer), "head_dim": 8, "sliding_window": 12}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    torch.manual_seed(0)
    whole = Gemma3ForConditionalGeneration(config).eval()
    whole.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert type(AutoModelForImageTextToText.from_pretrained(tmp_path)) is type(whole)
    model, _ = load_base(str(tmp_path), device="cpu")
    assert type(model).__name__ == "Gemma3ForCausalLM"
    assert not any("vision" in name for name, _ in model.named_modules())
    ids = torch.arange(3, 30)[None]
    torch.testing.assert_close(model(ids).logits, whole(ids).logits)
    engine = Engine.from_pretrained(str(tmp_path), device="cpu")
    assert engine.answer([QUESTION], max_new_tokens=2)[0].usage.answer_tokens


def test_a_revision_in_the_name_is_the_one_that_is_loaded(monkeypatch):
    asked = []

    def fetch(name, revision, **more):
        asked.append((name, revision))
        raise OSError("offline")

    monkeypatch.setattr(AutoConfig, "from_pretrained", fetch)
    for name, revision in (("me/mine@v1", None), ("me/mine", "v1")):
        with pytest.raises(ValueError, match="offline"):
            load_base(name, revision=revision, device="cpu")
    assert asked == [("me/mine", "v1")] * 2


def test_a_template_that_only_a_processor_has_is_used(tmp_path, tokenizer):
    template = tokenizer.chat_template
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    assert read_tokenizer(tmp_path).chat_template is None
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    assert read_tokenizer(tmp_path).chat_template == template
