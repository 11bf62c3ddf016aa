"""What a model must be, asked in one place, of a small random model made from its configuration.

Chunk reuse and block training are exact on a decoder if four properties hold: attention is all that
mixes tokens, every layer attends by the function that blocktune hands it and keeps keys of its own,
positions enter by rotating queries and keys alone, and a layer attends to what it tells that
function. `examine` proves them, or names the one that is missing. Nothing is decided by a
model's name.
"""

from __future__ import annotations

import json

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from blocktune.attention.interface import OWN_ATTENTION, can_switch, decoder_of
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
"""Layer types of a configuration whose layers only attend."""


def require_supported(model: PreTrainedModel) -> RopeSpec:
    """Refuses a model whose cached chunks could not be moved; returns how to move them.

    The frequencies are those that this model itself rotates with. It may be a PEFT model, quantised
    or split over processes: nothing runs through it. `Refused` names what stands in the way.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = base.config.get_text_config()
    cls = type(base) if isinstance(config, type(base).config_class) else causal_class(config)
    found = examine(config, cls)
    buffers = dict(decoder_of(base).named_buffers())
    return RopeSpec(tuple(one.rope(buffers) for one in found.layers), found.max_tokens)


def examine(config: PreTrainedConfig, cls: type[PreTrainedModel] | None = None) -> Structure:
    """Asks whether chunk reuse is exact on the models of a configuration, before any is loaded.

    ``config`` is of the text model or of a multimodal one around it; ``cls`` the model's class, by
    default what transformers has for it. `Refused` names what stands in the way.
    """
    whole, config = config, config.get_text_config(decoder=True)
    cls = cls or causal_class(config) or causal_class(whole)
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
    others = [index for index, kind in enumerate(kinds) if kind not in ATTENDING]
    if others:
        raise Mixes(mixes_tokens(cls.__name__, f"'{kinds[others[0]]}'", others[0], len(others)))
    depth, heads = (config_value(config, f"num_{x}") for x in ("hidden_layers", "attention_heads"))
    if not depth or depth < 1:
        raise Refused(
            f"{cls.__name__} is not one stack of layers over tokens (num_hidden_layers of its "
            f"configuration is {depth}), so chunks have no one set of keys to keep; use a decoder"
        )
    if heads is None:
        raise Mixes(mixes_tokens(cls.__name__, "a recurrence", 0, depth))
    if shared := getattr(config, "num_kv_shared_layers", None):
        raise Refused(without_keys(cls.__name__, list(range(depth - shared, depth))))
    if not can_switch(cls):
        raise Refused(OWN_ATTENTION.format(cls.__name__))
    key = json.dumps(config.to_dict(), sort_keys=True, default=str)
    if (cls, key) not in _KNOWN:
        _KNOWN[cls, key] = _examine(cls, config)
    return _KNOWN[cls, key]


_KNOWN: dict[tuple[type, str], Structure] = {}
"""What was found, by class and configuration: a process asks for the same one many times."""


def _examine(cls: type[PreTrainedModel], config: PreTrainedConfig) -> Structure:
    name, model, kind = cls.__name__, None, Refused
    what, fix = "cannot be built from its configuration", "correct config.json, or "
    try:
        with quiet(), torch.no_grad():
            small = small_config(config)
            model = small_model(small, cls)
            what, fix = "does not run on a plain sequence of tokens", ""
            probe = Probe(name, model, exact_length(config), exact_length(small))
            what, kind = "works on its attention mask or its cache in code of its own", NoRotary
            found = probe.run()
        decoder_layers(model)
        return found
    except Refused:
        raise
    except Exception as error:
        if model and not any(key.endswith("inv_freq") for key, _ in model.named_buffers()):
            raise kind(NO_ROTARY.format(name)) from error
        line = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise Refused(
            f"{name} {what}, so nothing is known of chunk reuse on it; {fix}use a decoder that "
            f"leaves masks and caches to transformers ({line})"
        ) from error


def exact_length(config: PreTrainedConfig) -> int | None:
    """Prompt length from which a model does more with positions than a rotation can undo.

    RoPE types that change their frequencies with the length of the prompt, queries scaled by
    absolute position (Ministral 3, Llama 4), attention in chunks of absolute positions (Llama 4)
    and attention to a fixed number of chosen tokens (DeepSeek V3.2).
    """
    lengths = []
    rope = getattr(config, "rope_parameters", None) or {}
    for one in [rope, *(part for part in rope.values() if isinstance(part, dict))]:
        original = one.get("original_max_position_embeddings")
        if one.get("rope_type") == "dynamic":
            lengths.append(config.max_position_embeddings)
        if one.get("rope_type") == "longrope" or one.get("llama_4_scaling_beta"):
            lengths.append(original)
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        lengths.append(config.attention_chunk_size)
    if getattr(config, "attn_temperature_tuning", False):
        lengths.append(config.floor_scale - 1)
    lengths.append(getattr(config, "index_topk", None))
    return min((length for length in lengths if length is not None), default=None)


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The model's decoder layers, through a PEFT wrapper or not; else raises `Refused`."""
    depth = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        named = name.endswith(("layers", "blocks", ".h"))
        if named and isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise Refused(
        f"{type(model).__name__} has no list of {depth} decoder layers to hook into, one for each "
        "attention; use a decoder whose layers attend once and are in one list"
    )
