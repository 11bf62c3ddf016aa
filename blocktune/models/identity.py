"""Digests that identify base, tokenizer and adapter, independent of where they are stored."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from blocktune.models.sharded import gathered, whole_shape
from blocktune.models.small import causal_class, quiet

SAMPLES = 64  # elements sampled from each weight, at equal strides
QUANTISED = "quantised"  # for linear weights of a quantised base, which cannot be compared
_ARCHITECTURE = (
    *("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "intermediate_size", "tie_word_embeddings"),
    *("rms_norm_eps", "sliding_window", "rope_parameters"),
)
_TRAINED = ("ranknum.", "trainable_tokens", "blocktune_links", "modules_to_save.")


def base_fingerprint(model: PreTrainedModel, state: Mapping[str, Tensor] | None = None) -> str:
    """Digests of a base's architecture, plain and linear weights, whatever adapter or links it has.

    They are the same in float32 and bfloat16; of a 4- or 8-bit base only embeddings and norms
    count. The model must not be merged or resized. ``state`` has its whole weights by name, if a
    launch has split them. Raises ValueError if a weight is not in memory.
    """
    plain, linear = hashlib.sha256(), hashlib.sha256()
    quantised = False
    for name, weight in _base_weights(model, state):
        is_linear = len(whole_shape(weight)) != 1 and "embed" not in name
        quantised |= not weight.is_floating_point()
        with gathered(weight):
            (linear if is_linear else plain).update(name.encode() + _sample(name, weight))
    parts = (architecture_of(model.config), plain.hexdigest()[:16], linear.hexdigest()[:16])
    return "-".join((*parts[:2], QUANTISED if quantised else parts[2]))


def architecture_of(config: PreTrainedConfig) -> str:
    """The first part of the `base_fingerprint` of a model with this configuration."""
    values = config.get_text_config().to_dict()
    shape = {name: values.get(name) for name in _ARCHITECTURE}
    if eps := shape["rms_norm_eps"]:
        shape["rms_norm_eps"] = float(f"{eps:.6g}")  # GGUF files hold it in float32
    return digest_of(shape)


class _Saved(dict):
    """The files of weights by the weights' names; the weights are read on access."""

    def __getitem__(self, name: str) -> Tensor:
        return super().__getitem__(name).get_tensor(name)


def saved_fingerprint(folder: str | Path, config: PreTrainedConfig) -> str | None:
    """`base_fingerprint` of the safetensors in a folder, of which it reads only the samples.

    None: unknown (other or damaged files, quantised, multimodal, or weights renamed on loading).
    """
    cls = causal_class(config)
    is_text = config.get_text_config(decoder=True) is config
    if cls is None or not is_text or getattr(config, "quantization_config", None):
        return None
    with torch.device("meta"), quiet(), suppress(SafetensorError, OSError, RuntimeError):
        saved = _Saved()
        for path in Path(folder).glob("*.safetensors"):
            file = safe_open(path, "pt")
            saved |= dict.fromkeys(file.keys(), file)
        model = cls(config)
        if saved.keys() == {name for name, _ in model.named_parameters()}:
            return base_fingerprint(model, saved)
    return None


def same_base(one: str, other: str) -> bool:
    """Whether two `base_fingerprint`s can belong to the same checkpoint."""
    pairs = zip(one.split("-"), other.split("-"), strict=False)
    return one.count("-") == other.count("-") and all(
        left == right or QUANTISED in (left, right) for left, right in pairs
    )


def adapter_fingerprint(folder: str | Path) -> str:
    """Digest (16 hex digits) of all ``*.safetensors`` in an adapter's folder, without its name."""
    digest = hashlib.sha256()
    for path in sorted(Path(folder).glob("*.safetensors")):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.name} {content}\n".encode())
    return digest.hexdigest()[:16]


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest of what turns text into ids: rules, vocabulary, special tokens, chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    if backend is not None:  # it stores padding and truncation of the last call
        rules = {key: rules[key] for key in rules if key not in ("padding", "truncation")}
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return digest_of({"rules": rules, "special": special, "template": tokenizer.chat_template})


def _base_weights(
    model: PreTrainedModel, state: Mapping[str, Tensor] | None
) -> Iterator[tuple[str, Tensor]]:
    # PEFT starts the names of an adapter's weights with a prefix of its kind.
    kind = getattr(getattr(model, "base_model", None), "prefix", "lora_")
    for name, weight in model.named_parameters():
        if not any(mark in name for mark in (kind, *_TRAINED)):
            weight = weight if state is None else state[name]
            name = name.removeprefix("base_model.model.").replace(".base_layer", "")
            yield name.replace(".token_adapter", "").replace(".original_module", ""), weight


def _sample(name: str, weight: Tensor) -> bytes:
    if weight.is_meta:
        raise ValueError(f"cannot fingerprint '{name}', not in memory; do not offload it to disk")
    if not weight.is_floating_point():
        return b""
    flat = weight.detach().reshape(-1)
    sample = flat[:: max(1, flat.numel() // SAMPLES)][:SAMPLES].to(torch.bfloat16).contiguous()
    return sample.cpu().view(torch.uint8).numpy().tobytes()


def digest_of(value: Any) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of a value as JSON."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
