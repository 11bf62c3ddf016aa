"""A tiny random config of every supported model family and RoPE type.

Weights have a standard deviation of 0.2: at the usual 0.02 a wrong mask cell moves the logits by
less than the tolerance.
"""

import json
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

VOCAB = 97
WINDOW = 12
HYBRID = ["sliding_attention", "full_attention"]
BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
HEAD = {**BASE, "head_dim": 8}
GEMMA = {**HEAD, "sliding_window": WINDOW, "layer_types": HYBRID}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
SINKS = {**GEMMA, "num_local_experts": 4, "num_experts_per_tok": 2}
FAMILIES = {
    "llama": lambda: LlamaConfig(**BASE),
    "qwen2": lambda: Qwen2Config(**BASE),
    "qwen3": lambda: Qwen3Config(**HEAD),
    "mistral": lambda: MistralConfig(**BASE, sliding_window=WINDOW),
    "gemma2": lambda: Gemma2Config(**GEMMA, query_pre_attn_scalar=8, attn_logit_softcapping=5.0),
    "gemma3": lambda: Gemma3TextConfig(**GEMMA),
    "phi3": lambda: Phi3Config(**BASE, rope_parameters=rope("default", partial_rotary_factor=0.5)),
    "granite": lambda: GraniteConfig(**BASE, attention_multiplier=0.2, residual_multiplier=0.5),
    "olmo2": lambda: Olmo2Config(**BASE),
    "mixtral": lambda: MixtralConfig(**BASE, num_local_experts=4, sliding_window=None),
    "qwen3-moe": lambda: Qwen3MoeConfig(**HEAD, **EXPERTS),
    "cohere": lambda: CohereConfig(**BASE, logit_scale=1.0),  # 0.0625 would hide differences
    "gpt-oss": lambda: GptOssConfig(**SINKS),
}
EXPERT_FAMILIES = ("mixtral", "qwen3-moe", "gpt-oss")


def rope(kind: str, **parameters) -> dict:
    return {"rope_type": kind, "rope_theta": 10_000.0, **parameters}


YARN = rope("yarn", factor=4.0, original_max_position_embeddings=128)
LLAMA3 = rope(
    "llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=128,
)
ROPES = {
    "default": lambda: LlamaConfig(**BASE),
    "linear": lambda: LlamaConfig(**BASE, rope_parameters=rope("linear", factor=4.0)),
    "llama3": lambda: LlamaConfig(**BASE, rope_parameters=LLAMA3),
    "yarn": lambda: LlamaConfig(**BASE, rope_parameters=YARN),
    "partial": FAMILIES["phi3"],
    "per-layer-type": lambda: Gemma3TextConfig(
        **GEMMA,
        rope_parameters={
            "sliding_attention": rope("default"),
            "full_attention": {**rope("linear", factor=8.0), "rope_theta": 1_000_000.0},
        },
    ),
}


def build(config, seed: int = 0) -> PreTrainedModel:
    """A random model in evaluation mode; norms and biases are random too, so that they count."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def only_configured(folder: Path, config) -> str:
    """A folder with a configuration and no weights: what is refused there was refused by it."""
    config.architectures = [AutoModelForCausalLM._model_mapping[type(config)].__name__]
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    return str(folder)


def windows(config) -> list[int | None]:
    """The sliding window of each layer, read from the config as the papers of the family say."""
    kinds = getattr(config, "layer_types", None) or ["uniform"] * config.num_hidden_layers
    window = getattr(config, "sliding_window", None)
    uniform = window if config.model_type in ("mistral", "mixtral", "phi3") else None
    by_kind = {"sliding_attention": window, "full_attention": None, "uniform": uniform}
    return [by_kind[kind] for kind in kinds]


def dealt(families, cases, every=3) -> list[tuple]:
    """Pairs to test: all of `WHOLE`'s, of other families each ``every``-th case, in turn.

    Every family meets a share of the cases and every case a share of the families.
    """
    return [
        (family, case)
        for at, family in enumerate(families)
        for number, case in enumerate(cases)
        if family in WHOLE or (at + number) % every == 0
    ]


WHOLE = ("llama", "mistral", "gemma3")
"""No windows, windows alone, both with two frequencies: what choosing and placing meet."""
