"""Checks on a small random model of its configuration whether a model supports chunk reuse.

Chunk reuse and block training are exact on a decoder if only attention mixes tokens, every layer
attends by the function (and only to the states) passed to it and keeps its own keys, and positions
enter only by rotating queries and keys.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from blocktune.attention.interface import OWN_ATTENTION, decoder_of
from blocktune.models.probe import (
    NO_ROTARY,
    Mixes,
    NoRotary,
    Probe,
    Refused,
    Structure,
    mixes_tokens,
    without_keys,
)
from blocktune.models.small import causal_class, config_value, quiet, small_config, small_model
from blocktune.positions import RopeSpec

ATTENDING = ("full_attention", "sliding_attention", "chunked_attention", "attention")
"""Layer types in a configuration that mix tokens only by attention."""


def require_supported(model: PreTrainedModel) -> RopeSpec:
    """How to move cached chunks of a model (also PEFT's, quantised, split). Raises as `examine`."""
    base = unwrapped(model)
    config = base.config.get_text_config()
    cls = type(base) if isinstance(config, type(base).config_class) else causal_class(config)
    structure = examine(config, cls)
    buffers = dict(decoder_of(base).named_buffers())
    return RopeSpec(tuple(la.rope(buffers) for la in structure.layers), structure.max_tokens)


def examine(config: PreTrainedConfig, cls: type[PreTrainedModel] | None = None) -> Structure:
    """Checks from a configuration, without loading a model, that chunk reuse is exact on it.

    The configuration may be that of a multimodal model; ``cls`` is the model's class, by default
    the one in transformers. Raises `Refused`, which names the missing property.
    """
    outer, config = config, config.get_text_config(decoder=True)
    cls = cls or causal_class(config) or causal_class(outer)
    if cls is None:
        raise Refused(
            f"transformers has no causal language model of type '{config.model_type}'; use a "
            "decoder that AutoModelForCausalLM can load"
        )
    if config.is_encoder_decoder:
        raise Refused(
            f"{cls.__name__} is the decoder of an encoder-decoder model, which attends to an "
            "encoder's output; use a decoder-only model"
        )
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ()
    if others := [index for index, kind in enumerate(kinds) if kind not in ATTENDING]:
        raise Mixes(mixes_tokens(cls.__name__, f"'{kinds[others[0]]}'", others[0], len(others)))
    depth, heads = (config_value(config, f"num_{x}") for x in ("hidden_layers", "attention_heads"))
    if not depth or depth < 1:
        raise Refused(
            f"{cls.__name__} is not one stack of layers over tokens (num_hidden_layers of its "
            f"configuration is {depth}), so it has no single set of keys to cache; use a decoder"
        )
    if heads is None:
        raise Mixes(mixes_tokens(cls.__name__, "a recurrence", 0, depth))
    if shared := getattr(config, "num_kv_shared_layers", None):
        raise Refused(without_keys(cls.__name__, list(range(depth - shared, depth))))
    if not getattr(cls, "_can_set_attn_implementation", lambda: True)():
        raise Refused(OWN_ATTENTION.format(cls.__name__))
    key = json.dumps(config.to_dict(), sort_keys=True, default=str)
    if (cls, key) not in _RESULTS:
        _RESULTS[cls, key] = _examine(cls, config)
    return _RESULTS[cls, key]


_RESULTS: dict[tuple[type, str], Structure] = {}
"""Results by class and configuration, because a process examines the same one many times."""


def _examine(cls: type[PreTrainedModel], config: PreTrainedConfig) -> Structure:
    name, model, kind = cls.__name__, None, Refused
    what, fix = "cannot be built from its configuration", "correct config.json, or "
    try:
        with quiet(), torch.no_grad():
            small = small_config(config)
            model = small_model(small, cls)
            what, fix = "does not run on a plain sequence of tokens", ""
            probe = Probe(name, model, exact_length(config), exact_length(small))
            what, kind = "handles its attention mask or its cache in its own code", NoRotary
            structure = probe.run()
        decoder_layers(model)
        return structure
    except Refused:
        raise
    except Exception as error:
        if model and not any(key.endswith("inv_freq") for key, _ in model.named_buffers()):
            raise kind(NO_ROTARY.format(name)) from error
        line = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise Refused(
            f"{name} {what}, so chunk reuse on it cannot be checked; {fix}use a decoder that "
            f"leaves masks and caches to transformers ({line})"
        ) from error


def exact_length(config: PreTrainedConfig) -> int | None:
    """Prompt length up to which moving chunks by rotation is exact; None: no limit."""
    # index_topk: the maximum number of attended tokens (DeepSeek V3.2)
    lengths = [getattr(config, "index_topk", None)]
    for part in _ropes(config):
        original = part.get("original_max_position_embeddings")
        if part.get("rope_type") == "dynamic":
            lengths.append(config.max_position_embeddings)
        # Frequencies by the prompt's length, queries scaled by absolute position (Ministral 3).
        if part.get("rope_type") == "longrope" or part.get("llama_4_scaling_beta"):
            lengths.append(original)
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        lengths.append(config.attention_chunk_size)
    if getattr(config, "attn_temperature_tuning", False):  # of queries, by position (Llama 4)
        lengths.append(config.floor_scale - 1)
    return min((length for length in lengths if length is not None), default=None)


def context_length(config: PreTrainedConfig) -> int:
    """Most tokens of a prompt with its answer; 2 ** 30 for models without a limit."""
    # YaRN with an explicit factor extends max_position_embeddings, as on Qwen 2.5 and 3.
    yarn = [p for p in _ropes(config) if p.get("rope_type") == "yarn" and p.get("factor")]
    extended = [int(p["original_max_position_embeddings"] * p["factor"]) for p in yarn]
    return max([getattr(config, "max_position_embeddings", 1 << 30), *extended])


def _ropes(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """The RoPE parameters of a configuration, and those of each layer type, if they differ."""
    rope = getattr(config, "rope_parameters", None) or {}
    return [rope, *(part for part in rope.values() if isinstance(part, dict))]


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The list of decoder layers, also inside a PEFT wrapper. Raises `Refused` if there is none."""
    depth = model.config.get_text_config().num_hidden_layers
    for name, module in decoder_of(model).named_modules():
        is_layers = f".{name}".endswith(("layers", "blocks", ".h"))
        if is_layers and isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise Refused(
        f"{type(model).__name__} has no list of {depth} decoder layers to hook into, one for each "
        "attention; use a decoder whose layers attend once and are in one list"
    )
