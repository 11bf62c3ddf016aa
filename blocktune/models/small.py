"""Small random models with the structure of a given configuration.

Layers, head sizes and rotary parameters stay the same. Widths, experts and the vocabulary become
small, and windows so short that a short input exceeds them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

VOCABULARY = 384
LARGEST = 400_000_000  # most parameters of a small model
WINDOW = 12  # sliding window of a small model, in tokens
SPAN = 120  # other lengths at which its attention changes (chunked, indexed), in tokens
_SIZES = {
    r".*intermediate_(multiple_)?size(_mlp)?|(attention|.*ffn)_hidden_size|.*ffn_dim": 64,
    r"n_inner|dff|feed_forward_size": 64,
    r"(num|moe_num|num_local|n_routed)_?(local_|routed_)?experts": 4,
    r"(moe_)?num_experts_per_tok(en)?|moe_topk|moe_k|top_k_experts|index_topk_blocks": 2,
    r"n_group|topk_group|num_expert_group|zero_expert_num|kv_n_heads": 1,
    r"sliding_window(_size)?|(local_)?attention_window(_size|_len)?|local_attention": WINDOW,
    r"attention_chunk_size|floor_scale|index_topk": SPAN,
    r"index_block_size": 8,
    r"[qk]v?_lora_rank|o_lora_rank|hidden_size_per_layer_input|router_hidden_size": 32,
    r"qk_nope_head_dim|v_head_dim": 16,
}
"""Sizes of a small model, by a pattern of the configuration's field names."""
_PARTS = _SIZES | {r"num_hidden_layers|num_blocks|depth": 2}
"""Sizes in nested configurations, such as those of image encoders."""
_DROPPED = ("quantization_config", "dtype", "transformers_version", "architectures", "model_type")


def config_value(config: PreTrainedConfig, *names: str) -> Any:
    """The value of the first field (by transformers' name or its own) that has one, or None."""
    values = config.to_dict()
    given = (values.get(config.attribute_map.get(name, name)) for name in names)
    return next((value for value in given if value is not None), None)


def causal_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The causal language model class of a configuration; None if transformers has none."""
    cls = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return cls[0] if isinstance(cls, tuple | list) else cls


def small_config(
    config: PreTrainedConfig, *, heads: int = 2, layers: int | None = None
) -> PreTrainedConfig:
    """A copy of a text model's configuration with small widths.

    It has ``heads`` query heads (half as many key heads if grouped), and the first ``layers``.
    """
    values = {k: v for k, v in config.to_dict().items() if k not in _DROPPED}
    names = config.attribute_map

    def size(name: str) -> int | None:
        value = values.get(names.get(name, name))
        return value if _is_count(value) else None

    old, shared, width = map(size, ("num_attention_heads", "num_key_value_heads", "hidden_size"))
    depth, dim = size("num_hidden_layers"), size("head_dim")
    key_heads = heads if shared == old else max(1, heads // 2)
    few = {"num_attention_heads": heads, "num_key_value_heads": key_heads}
    for name, value in values.items():
        values[name] = _small(name, value)
        if layers is not None and isinstance(value, list) and len(value) == depth:
            values[name] = values[name][:layers]
    if by_layer := values.get("per_layer_config"):
        values["per_layer_config"] = {
            index: {k: few.get(k, _small(k, v)) for k, v in by_layer[index].items()}
            for index in by_layer
            if layers is None or int(index) < layers
        }
    if values.get("qk_head_dim"):
        values["qk_head_dim"] = values["qk_nope_head_dim"] + values["qk_rope_head_dim"]
    standard: dict[str, Any] = {"num_hidden_layers": layers} if layers is not None else {}
    if width and not old:  # a purely recurrent model
        standard["hidden_size"] = 64
    if old and width:
        dim = dim or width // old
        standard |= few | {"hidden_size": heads * dim, "head_dim": dim}
        standard = {k: v for k, v in standard.items() if names.get(k, k) in values}
    return type(config)(**values | {names.get(key, key): v for key, v in standard.items()})


def _small(name: str, value: Any, sizes: Mapping[str, int] = _SIZES) -> Any:
    if isinstance(value, dict):
        return {key: _small(key, item, _PARTS) for key, item in value.items()}
    if isinstance(value, list) and value and all(map(_is_count, value)):
        return [_small(name, item, sizes) for item in value]
    if not _is_count(value):
        return value
    if name.endswith("_token_id"):
        return 0
    if "vocab_size" in name or name.endswith("_vocab"):
        return VOCABULARY
    return min(value, next((s for key, s in sizes.items() if re.fullmatch(key, name)), value))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def small_model(config: PreTrainedConfig, cls: type[PreTrainedModel]) -> PreTrainedModel:
    """A random float32 model on the CPU, the same at every call, in evaluation mode.

    Matrices preserve the scale of their input, and norms and biases are random, so that everything
    affects the output. Torch's random state does not change. ValueError: the model is not small.
    """
    with torch.device("meta"), quiet(), suppress(RuntimeError):  # some need values to be built
        count = sum(weight.numel() for weight in cls(config).parameters())
        if count > LARGEST:
            raise ValueError(f"it would have {count:,} parameters")
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), quiet(), torch.no_grad():
        torch.manual_seed(0)
        model = cls(config).float().eval()
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(std=weight.shape[-1] ** -0.5)
            else:
                weight.nan_to_num_().add_(0.2 * torch.randn_like(weight))
    return model


@contextmanager
def quiet() -> Iterator[None]:
    """Silences the logging of transformers (notes on configurations, kernels and masks)."""
    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(level)
