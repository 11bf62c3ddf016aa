"""Keys of cached entries, which change whenever the cached numbers would; and manifests.

The *fingerprint* covers what all chunks of an engine share: model, weights, adapter, tokenizer,
prompt format, dtype, RoPE. The *chunk key* adds the tokens and how they were encoded. Neither
covers a path or a date. A *manifest* says in JSON what made a model's chunks, for other engines.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blocktune.adapter import AdapterInfo
from blocktune.cache.chunk_kv import ChunkKV, Ids
from blocktune.cache.store.chunk_file import FORMAT, digest
from blocktune.models.identity import adapter_fingerprint, base_fingerprint, tokenizer_hash
from blocktune.positions import LayerRope, RopeSpec

MANIFEST_FORMAT = "blocktune manifest 1"
CACHE_FORMAT = 2  # of the stored content and its keys; part of every fingerprint
_SAMPLES, _REMEMBERED = 4096, 1024
_VOLATILE = {
    *("_name_or_path", "architectures", "transformers_version", "use_cache", "return_dict"),
    *("_attn_implementation", "_attn_implementation_internal", "attn_implementation"),
    *("output_attentions", "output_hidden_states"),
    *("dtype", "torch_dtype"),  # the dtype that counts is the one the model runs in
}
_ADAPTER_FILES = (".safetensors", ".bin", "adapter_config.json", "blocktune.json")


def model_fingerprint(
    model: nn.Module,  # as it will run: base, or with its adapter attached or merged
    adapter: str | Path | None,  # folder of the adapter; its weights and configuration files count
    tokenizer,  # vocabulary, merges, added tokens, special tokens and chat template count
    prompt_format: Mapping,  # fields of the prompt format, e.g. ``dataclasses.asdict(format)``
    dtype: torch.dtype | None = None,  # that the model computes in; None: that of its parameters
) -> str:
    """Digest of all that decides a chunk's states but its tokens. ValueError: offloaded weights."""
    config = json.dumps(model.config.to_dict(), default=str)
    return digest(
        cache_format=CACHE_FORMAT,
        config=json.loads(config, object_hook=_constant),
        weights=weights_hash(model),
        adapter=None if adapter is None else _adapter_hash(Path(adapter)),
        tokenizer=tokenizer_hash(tokenizer),
        prompt_format=dict(prompt_format),
        dtype=str(dtype or model.dtype),
    )


def chunk_key(fingerprint: str, token_ids: Ids, encoding: Mapping | None = None) -> str:
    """Digest, 64 hex digits, under which the encoded chunk of ``token_ids`` ``(S,)`` is stored.

    ``encoding`` describes in plain JSON values how it was encoded; empty: the chunk alone.
    """
    ids = torch.as_tensor(token_ids, dtype=torch.int64).tolist()
    return digest(fingerprint=fingerprint, token_ids=ids, encoding=dict(encoding or {}))


def key_after(fingerprint: str, token_ids: Ids, blanks: Sequence[int]) -> str:
    """`chunk_key` of a chunk that was encoded after ``blanks``, whose own states were dropped."""
    return chunk_key(fingerprint, token_ids, {"ghosts": list(blanks)})  # as in existing stores


def stored_key(fingerprint: str, ids: Ids, blanks: Sequence[int], scoped_prefix: bool) -> str:
    """`key_after` of tuples, memoised; or the key of a prefix, if a scoped adapter encodes it."""
    make = _stored_key if len(ids) + len(blanks) <= _REMEMBERED else _stored_key.__wrapped__
    return make(fingerprint, ids, blanks, scoped_prefix)


@lru_cache(2048)
def _stored_key(fingerprint: str, ids: Ids, blanks: Sequence[int], scoped_prefix: bool) -> str:
    if scoped_prefix:
        return chunk_key(fingerprint, ids, {"prefix": True})
    return key_after(fingerprint, ids, blanks)


def weights_hash(model: nn.Module) -> str:
    """Digest of names, shapes, dtypes and contents of all parameters and buffers.

    For speed it covers, of each tensor, 4,096 elements at even strides and the wrapping sum of all
    bytes as 64-bit integers: a change of one weight changes the sum, a reordering the sample,
    unless it moves others. Quantised weights count with their scales, adapters with their state.
    """
    content = hashlib.sha256()
    for name, tensor in _tensors(model):
        if tensor.is_meta:
            hint = "load the model without offloading to disk"
            raise ValueError(f"cannot fingerprint '{name}': its weights are not in memory; {hint}")
        content.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        content.update(_content(tensor.detach()))
    for name, module in model.named_modules():
        if hasattr(module, "scaling") and hasattr(module, "active_adapters"):
            state = (module.scaling, module.active_adapters, module.disable_adapters)
            content.update(f"{name} {state}".encode())
    return content.hexdigest()


def manifest(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_format: Mapping[str, Any],  # fields, as in `model_fingerprint`
    adapter: AdapterInfo | None,
    adapter_folder: str | Path | None,
    rope: RopeSpec,
    sample: ChunkKV,  # any chunk that the model encoded: it has shapes and the fingerprint
) -> dict[str, Any]:
    """The manifest of a model, in plain JSON values.

    ``layers`` are those that store keys, with the shapes of ``key`` and ``value`` (kv heads, head
    dim). ``rope`` has one item per distinct rotation: ``frequencies``, radians per position for
    each pair of rotated dimensions; ``start``, the first of these; ``interleaved``, whether pairs
    are neighbours; ``in_values``, whether values are rotated; and in ``layer`` each decoder layer's
    index. Keys are stored rotated, the chunk's first token at ``origin``. With the adapter's
    ``scope`` ``encode``, the plain base reads its chunks.
    """
    name, revision = model.config._name_or_path, getattr(model.config, "_commit_hash", None)
    template = str(tokenizer.chat_template or "").encode()
    return {
        "format": MANIFEST_FORMAT,
        "chunk_format": FORMAT,
        "fingerprint": sample.fingerprint,
        "base": {
            "name": (adapter.base_model if adapter else None) or name,
            "revision": (adapter.base_revision if adapter else None) or revision,
            "architecture": model.config.get_text_config().model_type,
            "fingerprint": adapter.base_fingerprint if adapter else base_fingerprint(model),
        },
        "adapter": _named_adapter(adapter_folder, adapter.scope if adapter else "both"),
        "tokenizer": {
            "name": tokenizer.name_or_path,
            "hash": tokenizer_hash(tokenizer),
            "template_hash": hashlib.sha256(template).hexdigest(),
        },
        "prompt_format": dict(prompt_format),
        "dtype": str(sample.dtype).removeprefix("torch."),
        "layers": [
            {"key": [key.shape[0], key.shape[2]], "value": [value.shape[0], value.shape[2]]}
            for key, value in zip(sample.keys, sample.values, strict=True)
        ],
        "rope": _rope(rope),
    }


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        yield name, parameter
        # bitsandbytes: the stored codes mean nothing without their scales.
        state = getattr(parameter, "quant_state", None)
        scales = state.as_dict(packed=True) if state is not None else {}
        scales["SCB"] = getattr(parameter, "SCB", None)
        for key, value in scales.items():
            if isinstance(value, Tensor):
                yield f"{name}.{key}", value
    yield from model.named_buffers()  # inverse RoPE frequencies; GPTQ and AWQ weights


def _content(tensor: Tensor) -> bytes:
    flat = tensor.contiguous().reshape(-1)
    step = max(1, -(-flat.numel() // _SAMPLES))
    sample = flat[::step].contiguous().view(torch.uint8).cpu().numpy().tobytes()
    raw = flat.view(torch.uint8)
    raw = raw.clone() if raw.storage_offset() % 8 else raw
    words = raw[: raw.numel() // 8 * 8].view(torch.int64)
    tail = raw[words.numel() * 8 :].cpu().numpy().tobytes()
    return sample + int(words.sum()).to_bytes(8, "little", signed=True) + tail


def _constant(part: dict) -> dict:
    return {name: value for name, value in part.items() if name not in _VOLATILE}


def _adapter_hash(folder: Path) -> dict[str, str]:
    hashes = {}
    for path in sorted(f for f in folder.iterdir() if f.name.endswith(_ADAPTER_FILES)):
        with path.open("rb") as file:
            hashes[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    if not hashes:
        raise ValueError(f"no adapter in {folder}: it holds no weights and no adapter_config.json")
    return hashes


def _named_adapter(folder: str | Path | None, scope: str) -> dict[str, Any] | None:
    if folder is None:
        return None
    folder, name, revision = Path(folder), str(folder), None
    for cached in (folder, *folder.parents):  # a repository in the Hub's local cache
        if cached.parent.name == "snapshots" and cached.parent.parent.name.startswith("models--"):
            name = cached.parent.parent.name.removeprefix("models--").replace("--", "/")
            revision = cached.name
    source = {"name": name, "revision": revision, "scope": scope}
    return source | {"fingerprint": adapter_fingerprint(folder)}


def _rope(rope: RopeSpec) -> dict[str, Any]:
    layers = [(tuple(spec.inv_freq.float().tolist()), *spec[1:]) for spec in rope.layers]
    distinct = list(dict.fromkeys(layers))
    facts = zip(("frequencies", *LayerRope._fields[1:]), map(list, zip(*distinct)))  # noqa: B905
    return dict(facts) | {"layer": [distinct.index(spec) for spec in layers]}
