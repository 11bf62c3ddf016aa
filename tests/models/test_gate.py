"""What a model must be: asked alike by serving and training, and never silently wrong."""

import pytest
import torch
from families import BASE, FAMILIES, HEAD, VOCAB, build, rope
from training.runs import make_trainer
from training.toy import toy_tokenizer
from transformers import (
    CohereConfig,
    DeepseekV3Config,
    GlmConfig,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    Phi3Config,
    SmolLM3Config,
)

from blocktune.engine import Engine
from blocktune.models.gate import require_supported


def test_layer_without_rope_keeps_its_keys():
    config = SmolLM3Config(**BASE, no_rope_layers=[1, 0])
    assert [len(f) for f in require_supported(build(config)).inv_freq] == [4, 0]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_moved_in_float32_and_bfloat16(family):
    model = build(FAMILIES[family]())
    wide = require_supported(model).inv_freq
    model.train()
    narrow = require_supported(model.bfloat16()).inv_freq
    assert len(wide) == len(narrow) == 2
    assert all(len(frequencies) in (2, 4) for frequencies in wide)
    assert all(module.training for module in model.modules())


def test_weights_that_are_codes_are_probed_in_the_models_dtype():
    """A 4-bit base without biases has no floating weight in its attention."""

    class Codes(torch.nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.plain = linear.weight.detach().t()
            codes = torch.zeros(linear.weight.numel() // 2, dtype=torch.uint8)
            self.weight = torch.nn.Parameter(codes, requires_grad=False)

        def forward(self, states):
            return states @ self.plain.to(states.dtype)

    model = build(FAMILIES["llama"]())
    plain = require_supported(model).inv_freq
    for layer in model.model.layers:
        for name, linear in list(layer.self_attn.named_children()):
            if isinstance(linear, torch.nn.Linear):
                setattr(layer.self_attn, name, Codes(linear))
    for found, expected in zip(require_supported(model).inv_freq, plain, strict=True):
        assert torch.equal(found, expected)


LONGROPE = rope(
    "longrope",
    short_factor=[1.0] * 4,
    long_factor=[2.0] * 4,
    original_max_position_embeddings=128,
    factor=4.0,
)
SMALL_GPT2 = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4}
SMALL_OPT = {"vocab_size": VOCAB, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2}
LATENT = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "first_k_dense_replace": 2,
}
REFUSED = {
    "dynamic": (
        lambda: LlamaConfig(**BASE, rope_parameters=rope("dynamic", factor=4.0)),
        "RoPE type 'dynamic', whose frequencies change",
    ),
    "longrope": (
        lambda: Phi3Config(**BASE, rope_parameters=LONGROPE),
        "RoPE type 'longrope', whose frequencies change",
    ),
    "gpt2": (lambda: GPT2Config(**SMALL_GPT2), "GPT2LMHeadModel has no rotary"),
    "opt": (
        lambda: OPTConfig(**SMALL_OPT, num_attention_heads=4, word_embed_proj_dim=32),
        "OPTForCausalLM has no rotary",
    ),
    "cohere": (lambda: CohereConfig(**BASE), "does not rotate its keys by halves"),
    "glm": (lambda: GlmConfig(**HEAD), "does not rotate its keys by halves"),
    "deepseek": (
        lambda: DeepseekV3Config(**{**BASE, "num_key_value_heads": 4}, **LATENT),
        "does not rotate its keys by halves",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_moved_is_refused_in_one_line(name):
    config, message = REFUSED[name]
    with pytest.raises(ValueError, match=message) as refusal:
        require_supported(build(config()))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["gpt2", "cohere"])
def test_training_and_serving_refuse_a_model_in_the_same_words(tmp_path, name):
    config, message = REFUSED[name]
    build(config()).save_pretrained(tmp_path / "other")
    toy_tokenizer().save_pretrained(tmp_path / "other")
    lines = []
    for door in (
        lambda: Engine.from_pretrained(str(tmp_path / "other"), device="cpu"),
        lambda: make_trainer(tmp_path, model_name_or_path=str(tmp_path / "other")),
    ):
        with pytest.raises(ValueError, match=message) as refusal:
            door()
        lines.append(str(refusal.value))
    assert lines[0] == lines[1]
