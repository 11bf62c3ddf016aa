"""What a model must be: asked alike by serving and training, before weights are read."""

import pytest
import torch
from families import BASE, FAMILIES, HEAD, ROPES, VOCAB, build, only_configured, rope
from training.runs import make_trainer
from training.toy import toy_tokenizer
from transformers import (
    BartConfig,
    CLIPVisionConfig,
    Cohere2Config,
    DeepseekV3Config,
    FalconH1Config,
    Gemma3nTextConfig,
    GlmConfig,
    GPT2Config,
    GPTNeoXConfig,
    Lfm2Config,
    Llama4TextConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Ministral3Config,
    OPTConfig,
    Phi3Config,
    Qwen3NextConfig,
    SmolLM3Config,
)

from blocktune.engine import Engine
from blocktune.models.gate import context_length, decoder_layers, examine, require_supported
from blocktune.models.probe import Refused


def test_layer_without_rope_keeps_its_keys():
    config = SmolLM3Config(**BASE, no_rope_layers=[1, 0])
    assert [len(one.inv_freq) for one in require_supported(build(config)).layers] == [4, 0]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_moved_in_float32_and_bfloat16(family):
    model = build(FAMILIES[family]())
    wide = require_supported(model).layers
    narrow = require_supported(model.bfloat16()).layers
    assert len(wide) == len(narrow) == 2
    assert all(len(one.inv_freq) in (2, 4) for one in wide)
    # What the model rotates with is rounded as well, and keys move by it.
    rounded = [one.inv_freq.bfloat16().float() for one in wide]
    assert all(torch.equal(a.inv_freq, b) for a, b in zip(narrow, rounded, strict=True))


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_long_pass_before_does_not_change_how_keys_are_moved(kind):
    """Both types overwrite the model's frequencies in a pass beyond the original length."""
    more = {"factor": 4.0}
    if kind == "longrope":
        more |= {"short_factor": [1.0] * 4, "long_factor": [8.0] * 4}
    ropes = rope(kind, **more, original_max_position_embeddings=32)
    model = build(LlamaConfig(**BASE | {"max_position_embeddings": 32}, rope_parameters=ropes))
    before = require_supported(model).layers[0].inv_freq
    model(torch.full((1, 60), 5))
    assert not torch.equal(model.model.rotary_emb.inv_freq, before)
    assert torch.equal(require_supported(model).layers[0].inv_freq, before)


def test_the_gate_leaves_random_numbers_as_they_were():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    examine(LlamaConfig(**BASE | {"hidden_size": 96, "num_attention_heads": 6}))
    assert torch.equal(torch.rand(4), expected)


LATENT = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "first_k_dense_replace": 2,
}
FORMS = {
    "llama": (lambda: LlamaConfig(**BASE), (0, False, False), 4),
    "cohere2": (lambda: Cohere2Config(**BASE), (0, True, False), 4),
    "glm": (lambda: GlmConfig(**HEAD), (0, True, False), 2),
    "gpt-neox": (lambda: GPTNeoXConfig(**BASE), (0, False, False), 1),
    "deepseek": (
        lambda: DeepseekV3Config(**{**BASE, "num_key_value_heads": 4}, **LATENT),
        (0, False, True),
        4,
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_the_form_of_the_rotation_is_found(name):
    config, form, pairs = FORMS[name]
    first = require_supported(build(config())).layers[0]
    assert (first[1:], len(first.inv_freq)) == (form, pairs)


LONGROPE = rope(
    "longrope",
    short_factor=[1.0] * 4,
    long_factor=[2.0] * 4,
    original_max_position_embeddings=128,
    factor=4.0,
)
SCALED = rope("yarn", factor=4.0, original_max_position_embeddings=64, llama_4_scaling_beta=0.1)
LIMITED = {
    "dynamic": (lambda: LlamaConfig(**BASE, rope_parameters=rope("dynamic", factor=4.0)), 512),
    "longrope": (
        lambda: Phi3Config(**BASE, rope_parameters=LONGROPE, original_max_position_embeddings=128),
        128,
    ),
    "ministral3": (lambda: Ministral3Config(**HEAD, rope_parameters=SCALED), 64),
    "llama4": (lambda: Llama4TextConfig(**HEAD, attention_chunk_size=96, floor_scale=80), 79),
}


@pytest.mark.parametrize("name", LIMITED)
def test_models_that_are_exact_up_to_a_length_say_it(name):
    config, length = LIMITED[name]
    assert examine(config()).max_tokens == length


def test_a_prompt_beyond_the_exact_length_is_refused():
    config = LIMITED["ministral3"][0]()
    tokenizer = toy_tokenizer()
    config.vocab_size = len(tokenizer)
    engine = Engine(build(config), tokenizer)
    question = {"question": "Who?", "chunks": ["she was there " * 10]}
    with pytest.raises(ValueError, match="reuse on this model is exact up to 64 tokens"):
        engine.answer([question])


def test_yarn_extends_the_context_as_qwen_documents_it():
    config = ROPES["yarn"]()
    assert context_length(config) == 512
    config.max_position_embeddings = 128
    assert context_length(config) == 4 * 128
    by_type = LlamaConfig(**BASE)
    by_type.rope_parameters = {"full_attention": config.rope_parameters | {"factor": 16.0}}
    assert context_length(by_type) == 16 * 128
    tokenizer = toy_tokenizer()
    config.vocab_size = len(tokenizer)
    question = {"question": "Who?", "chunks": ["she was there " * 20]}
    assert Engine(build(config), tokenizer).answer([question])[0].usage.prompt_tokens > 128


def test_the_layers_of_a_vision_tower_are_not_the_decoders():
    """Both towers have two layers; a schedule of rows must reach those of the text."""
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 4, "image_size": 28, "patch_size": 14}
    towers = {"vision_config": CLIPVisionConfig(**vision), "text_config": LlamaConfig(**BASE)}
    model = LlavaForConditionalGeneration(LlavaConfig(**towers, image_token_index=5))
    assert decoder_layers(model) is model.model.language_model.layers


SMALL_GPT2 = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4}
SMALL_OPT = {"vocab_size": VOCAB, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2}
NEXT = {**HEAD, "num_hidden_layers": 4, "num_experts": 4, "linear_num_value_heads": 4}
SHARED = {**HEAD, "num_hidden_layers": 10, "num_kv_shared_layers": 5, "intermediate_size": 48}
REFUSED = {
    "gpt2": (lambda: GPT2Config(**SMALL_GPT2), "GPT2LMHeadModel has no rotary"),
    "opt": (
        lambda: OPTConfig(**SMALL_OPT, num_attention_heads=4, word_embed_proj_dim=32),
        "OPTForCausalLM has no rotary",
    ),
    "bart": (lambda: BartConfig(), "decoder of an encoder-decoder"),
    "qwen3-next": (
        lambda: Qwen3NextConfig(**NEXT),
        "'linear_attention' in layer 0 and 2 more mixes",
    ),
    "lfm2": (
        lambda: Lfm2Config(**BASE, layer_types=["conv", "full_attention"]),
        "'conv' in layer 0 mixes tokens by other means",
    ),
    "falcon-h1": (lambda: FalconH1Config(**HEAD), "in layer 0.* mixes tokens by other means"),
    "gemma3n": (lambda: Gemma3nTextConfig(**SHARED), "5 layers .first: 5. have no keys"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_moved_is_refused_in_one_line(name):
    config, message = REFUSED[name]
    with pytest.raises(Refused, match=message) as refusal:
        examine(config())
    assert "\n" not in str(refusal.value)


def test_a_branch_beside_attention_is_found_where_the_configuration_does_not_tell(monkeypatch):
    """Every layer of Falcon-H1 attends; without its layer types only the probe can tell."""
    monkeypatch.setattr("blocktune.models.gate.ATTENDING", ("hybrid",))
    with pytest.raises(Refused, match="FalconH1Mixer in layer 0 mixes tokens by other means"):
        examine(FalconH1Config(**HEAD))


def test_training_and_serving_refuse_a_model_in_the_same_words(tmp_path):
    model, lines = only_configured(tmp_path / "other", REFUSED["gemma3n"][0]()), []
    for door in (
        lambda: Engine.from_pretrained(model, device="cpu"),
        lambda: make_trainer(tmp_path, model_name_or_path=model),
    ):
        with pytest.raises(Refused, match=REFUSED["gemma3n"][1]) as refusal:
            door()
        lines.append(str(refusal.value))
    assert lines[0] == lines[1]


def test_positions_below_zero_are_refused_where_positions_scale():
    config = LIMITED["ministral3"][0]()
    tokenizer = toy_tokenizer()
    config.vocab_size = len(tokenizer)
    engine = Engine(build(config), tokenizer)
    question = {"question": "Who?", "chunks": ["she was there"]}
    for method in ("ape", "naive + layout bos=drop", "fusionrag", "cache-craft"):
        with pytest.raises(ValueError, match="at positions below 0"):
            engine.answer([question], method)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda model: model.model, "needs a causal language model, got LlamaModel"),
        (lambda model: "data/tiny", r"got str; .*Engine.from_pretrained"),
        (torch.compile, r"got OptimizedModule; .*compile"),
        (lambda model: (model.lm_head.to("meta"), model)[1], "on one device, got cpu, meta"),
    ],
)
def test_what_is_no_plain_language_model_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        Engine(given(build(FAMILIES["llama"]())), toy_tokenizer())
