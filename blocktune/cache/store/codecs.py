"""Codecs: how a file stores keys and values. `round_trip` makes new entries equal to read ones."""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
from torch import Tensor

from blocktune.cache.chunk_kv import ChunkKV, Entry, Read
from blocktune.positions import LayerRope, RopeSpec
from blocktune.positions.relocation import relocate_keys

FP8 = torch.float8_e4m3fn
GROUP = {8: 64, 4: 32}  # largest group of numbers that share a scale and an offset, by bits
_HALF = (1e-2, 6e4)  # largest number of a tensor whose scales and offsets fit into 16 bits
_BITS = {"fp8": 0, "int8": 8, "int4": 4}


def encoded(
    entry: Entry, codec: str, rope: RopeSpec | None = None
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Header fields and tensors of a file. Only a `ChunkKV` is quantised, integers by ``rope``."""
    if codec == "as-is" or not isinstance(entry, ChunkKV):
        return {}, dict(entry.tensors())
    tensors, bits = {}, _BITS[codec]
    if bits:
        if rope is None:
            hint = "open the store through an engine, or use fp8"
            raise ValueError(f"int8 and int4 need the frequencies of the model's rotation; {hint}")
        # Layers that rotate values instead have unrotated keys: they get no frequencies.
        freqs = [spec.inv_freq[: 0 if spec.in_values else None] for spec in rope.layers]
        tensors = {f"rope.{layer}": f.float().cpu().clone() for layer, f in enumerate(freqs)}
        forms = [(spec.start, spec.interleaved) for spec in rope.layers]
    for layer, (key, value) in enumerate(zip(entry.keys, entry.values, strict=True)):
        if bits:
            form = LayerRope(tensors[f"rope.{layer}"], *forms[layer])
            key = _rotated(key, entry.origin, form, -1).transpose(1, 2)
        for name, tensor in ((f"key.{layer}", key), (f"value.{layer}", value)):
            parts = _pack(tensor, bits) if bits else _scale(tensor)
            tensors |= {f"{name}.{part}": packed.contiguous() for part, packed in parts.items()}
    dims = [(key.shape[2], value.shape[2]) for key, value in zip(entry.keys, entry.values)]  # noqa: B905
    dtype = str(entry.dtype).removeprefix("torch.")
    facts = {"codec": codec, "dtype": dtype, "dims": json.dumps(dims)}
    return facts | ({"rope": json.dumps(forms)} if bits else {}), tensors


def decoded(header: Mapping[str, str], read: Read, num_tokens: int) -> Read:
    """Wraps ``read``, which reads a file's tensors, to decode them. Raises as ``read`` does."""
    codec = header.get("codec", "as-is")
    if codec == "as-is":
        return read
    if codec not in _BITS:
        raise ValueError(f"it is stored with the unknown codec '{codec}'")
    dtype = getattr(torch, header["dtype"])
    dims, bits = json.loads(header["dims"]), _BITS[codec]

    def decode(name: str) -> Tensor:
        kind, _, layer = name.partition(".")
        parts = {part: read(f"{name}.{part}") for part in ("codes", "scale")}
        if not bits:
            return (parts["codes"].float() * parts["scale"]).to(dtype)
        parts["low"] = read(f"{name}.low")
        if kind == "value":
            return _unpack(parts, bits, dims[int(layer)][1]).to(dtype)
        key = _unpack(parts, bits, num_tokens).transpose(1, 2)
        form = LayerRope(read(f"rope.{layer}"), *json.loads(header["rope"])[int(layer)])
        return _rotated(key, int(header["origin"]), form, 1).to(dtype).contiguous()

    return decode


def round_trip(entry: Entry, codec: str, rope: RopeSpec | None = None) -> Entry:
    """The entry as it would be read back from a file with this codec."""
    facts, tensors = encoded(entry, codec, rope)
    if not facts:
        return entry
    facts |= {name: str(fact) for name, fact in entry.facts().items()}
    read = decoded(facts, tensors.__getitem__, entry.num_tokens)
    return type(entry).restore(facts, read, entry.token_ids, entry.fingerprint)


def _scale(tensor: Tensor) -> dict[str, Tensor]:
    """Quantises to 8-bit floats with one scale per head, ``(K, 1, 1)``."""
    top = tensor.float().abs().amax(dim=(1, 2), keepdim=True)
    scale = (top / torch.finfo(FP8).max).clamp_min(1e-12)
    return {"codes": (tensor.float() / scale).to(FP8), "scale": scale}


def _pack(tensor: Tensor, bits: int) -> dict[str, Tensor]:
    """Quantises to integers with a scale and an offset for each group along the last axis.

    Keys per channel, values per token (KIVI, arXiv:2402.02750), keys before their rotation
    (KVQuant, arXiv:2401.18079).
    """
    length = tensor.shape[-1]
    group = -(-length // -(-length // GROUP[bits]))  # groups of equal size need little padding
    group += group % 2
    last = tensor[..., -1:].expand(*tensor.shape[:-1], -length % group)
    groups = torch.cat((tensor, last), dim=-1).float().unflatten(-1, (-1, group))
    low, high = groups.aminmax(dim=-1, keepdim=True)
    dtype = torch.float16 if _HALF[0] < float(groups.abs().max()) < _HALF[1] else torch.float32
    low = low.to(dtype)
    scale = ((high - low.float()) / (2**bits - 1)).clamp_min(torch.finfo(dtype).tiny).to(dtype)
    codes = ((groups - low.float()) / scale.float()).round().clamp(0, 2**bits - 1).to(torch.uint8)
    if bits == 4:
        codes = codes[..., ::2] | codes[..., 1::2] << 4
    return {"codes": codes, "scale": scale, "low": low}


def _unpack(parts: Mapping[str, Tensor], bits: int, length: int) -> Tensor:
    codes = parts["codes"]
    if bits == 4:
        codes = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)
    return (codes * parts["scale"].float() + parts["low"].float()).flatten(-2)[..., :length]


def _rotated(keys: Tensor, origin: int, rope: LayerRope, sign: int) -> Tensor:
    """Removes (``sign`` -1) or applies (1) the rotation of keys ``(K, S, D)``."""
    positions = torch.arange(origin, origin + keys.shape[1], device=keys.device)[None]
    return relocate_keys(keys.float()[None], sign * positions, rope)[0]
