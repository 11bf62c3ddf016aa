"""What a store keeps of a chunk: keys and values, hidden states; as they are or with fewer bits.

A codec turns one layer's keys and values into named tensors and back. What the store hands out
after `round_trip` is what a file gives back later, so an answer does not depend on where a chunk
was found.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from blocktune.cache.config import CODECS, Tier
from blocktune.positions import LayerRope, RopeSpec
from blocktune.positions.relocation import relocate_keys

Read = Callable[[str], Tensor]
"""Gives the tensor of a name."""
FP8 = torch.float8_e4m3fn
GROUP = {8: 64, 4: 32}
"""Most numbers that share a scale and an offset, by bits."""
_HALF_LIMIT, _BITS = 6e4, {"fp8": 0, "int8": 8, "int4": 4}
State = tuple[Tensor | None, ...]
"""The recurrent state of one prompt at one depth, layer by layer."""


class Entry(ABC):
    """One chunk's tensors of one kind. Tensors are shared: never write into them."""

    kind: ClassVar[str]  # its name, part of the file's header
    token_ids: Tensor  # what was encoded, ``(S,)`` int64
    fingerprint: str  # hex digest of the model that encoded it, `model_fingerprint`

    @abstractmethod
    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors, without the token ids."""

    @abstractmethod
    def facts(self) -> dict[str, int]:
        """What else it takes to `restore` the entry."""

    @classmethod
    @abstractmethod
    def restore(cls, facts: Mapping, read: Read, token_ids: Tensor, fingerprint: str) -> Self:
        """Inverse of `facts` and `tensors`; KeyError or ValueError if they make no entry."""

    @property
    def num_tokens(self) -> int:
        """Tokens stored."""
        return self.token_ids.shape[0]

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of all tensors and the token ids: what it costs to hold or to read."""
        return sum(tensor.nbytes for _, tensor in self.tensors()) + self.token_ids.nbytes

    def matches(self, token_ids: Sequence[int] | Tensor, fingerprint: str) -> bool:
        """Whether this is the state of exactly these tokens under exactly this model."""
        if fingerprint != self.fingerprint:
            return False
        if token_ids is vars(self).get("_matched"):  # the same object: texts' ids are remembered
            return True
        own = self.token_ids.cpu()
        if isinstance(token_ids, Tensor):
            return torch.equal(token_ids.to("cpu", torch.int64), own)
        same = own.numpy().tobytes() == array("q", token_ids).tobytes()  # faster than a tensor
        if same and isinstance(token_ids, tuple):
            vars(self)["_matched"] = token_ids
        return same

    def to(self, device: torch.device | str) -> Self:
        """Moves the tensors; token ids stay where comparing is cheap, on the CPU."""
        return self._map(lambda tensor: tensor.to(device))

    def compact(self) -> Self:
        """Copies tensors that are views, so that holding a chunk never holds its batch."""
        return self._map(own)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Self:
        tensors = dict(self.tensors())
        ids = own(self.token_ids.cpu())
        return self.restore(self.facts(), lambda n: function(tensors[n]), ids, self.fingerprint)


class Lookup(NamedTuple):
    """What one look into the store found, and what it took."""

    kv: Entry | None  # None: encode it and `ChunkStore.put` it
    tier: Tier  # where it was found
    bytes_read: int  # of keys, values and ids; 0 on a miss
    lookup_s: float  # seconds spent finding out whether it is there
    load_s: float  # seconds spent reading, verifying and moving it


def own(tensor: Tensor) -> Tensor:
    """The tensor, copied if it is a view or not contiguous."""
    if tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


_HEX = re.compile(r"[0-9a-f]+")


@dataclass(frozen=True, eq=False)
class ChunkKV(Entry):
    """The attention state of one encoded chunk. Tensors are shared: never write into them.

    Keys are ``(K, S, D)`` for each layer that stores any, RoPE applied at the positions
    ``origin .. origin + S - 1``, from where relocation starts; layers may differ in ``K`` and
    ``D``. Values likewise; their ``D`` may differ from the keys'.
    """

    kind: ClassVar[str] = "chunk"
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    token_ids: Tensor  # ``(S,)`` int64, without the blanks before it
    fingerprint: str
    origin: int = 0  # position of the first stored token, e.g. the number of blanks before it

    def __post_init__(self):
        if not self.keys or len(self.keys) != len(self.values):
            raise ValueError(
                "a chunk's KV needs keys and values of the same layers, at least one; "
                f"got {len(self.keys)} key and {len(self.values)} value tensors"
            )
        _check_ids(self.token_ids)
        if not self.num_tokens:
            raise ValueError("a chunk's KV needs at least one token; got none")
        if not _HEX.fullmatch(self.fingerprint):
            raise ValueError(f"a fingerprint is a lower-case hex digest; got {self.fingerprint!r}")
        if self.origin < 0:
            raise ValueError(f"the origin of a chunk's KV is a position >= 0; got {self.origin}")
        for layer, (key, value) in enumerate(zip(self.keys, self.values, strict=True)):
            self._check_layer(layer, key, value)

    def _check_layer(self, layer: int, key: Tensor, value: Tensor) -> None:
        if key.ndim != 3 or value.ndim != 3 or key.shape[:2] != value.shape[:2]:
            raise ValueError(
                f"layer {layer}: keys and values must be (kv heads, tokens, head dim); "
                f"got {tuple(key.shape)} and {tuple(value.shape)}"
            )
        if key.shape[1] != self.num_tokens:
            raise ValueError(
                f"layer {layer} holds {key.shape[1]} tokens, the chunk has {self.num_tokens}"
            )
        if not key.dtype.is_floating_point or {key.dtype, value.dtype} != {self.dtype}:
            raise ValueError(
                f"all keys and values of a chunk must have one floating dtype; layer {layer} "
                f"has {key.dtype} and {value.dtype}, layer 0 has {self.dtype}"
            )

    @property
    def num_layers(self) -> int:
        """Layers that store keys of their own."""
        return len(self.keys)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of all keys and values."""
        return self.keys[0].dtype

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Layer by layer, ``key.0``, ``value.0``, ``key.1`` and so on."""
        for layer, (key, value) in enumerate(zip(self.keys, self.values, strict=True)):
            yield f"key.{layer}", key
            yield f"value.{layer}", value

    def facts(self) -> dict[str, int]:
        return {"num_layers": self.num_layers, "origin": self.origin}

    @classmethod
    def restore(cls, facts: Mapping, read: Read, token_ids: Tensor, fingerprint: str) -> Self:
        layers = range(int(facts["num_layers"]))
        return cls(
            keys=tuple(read(f"key.{layer}") for layer in layers),
            values=tuple(read(f"value.{layer}") for layer in layers),
            token_ids=token_ids,
            fingerprint=fingerprint,
            origin=int(facts["origin"]),
        )


@dataclass(frozen=True, eq=False)
class ChunkStates(Entry):
    """Hidden states of a chunk at the input of one layer, as the chunk alone made them.

    From them that layer can be computed again for all tokens (DroidSpeak's E-cache,
    arXiv:2411.02820). They take ``hidden`` numbers a token where keys and values take ``2 *
    kv_heads * head_dim``, so only the layers that a method starts from are stored.
    """

    kind: ClassVar[str] = "states"
    states: Tensor  # ``(S, hidden)``, before the layer's norm: free of positions
    layer: int  # 0-based, that they enter
    token_ids: Tensor  # ``(S,)`` int64, without the blanks before it
    fingerprint: str

    def __post_init__(self):
        _check_ids(self.token_ids)
        wanted = (self.states.ndim, len(self.states)) == (2, self.num_tokens)
        if not wanted or not self.num_tokens or not self.states.dtype.is_floating_point:
            raise ValueError(
                f"states of a chunk of {self.num_tokens} tokens must be floating "
                f"(tokens, hidden); got {tuple(self.states.shape)} {self.states.dtype}"
            )
        if self.layer < 0:
            raise ValueError(f"states enter a layer >= 0; got {self.layer}")

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield "states", self.states

    def facts(self) -> dict[str, int]:
        return {"layer": self.layer}

    @classmethod
    def restore(cls, facts: Mapping, read: Read, token_ids: Tensor, fingerprint: str) -> Self:
        return cls(read("states"), int(facts["layer"]), token_ids, fingerprint)


def _check_ids(token_ids: Tensor) -> None:
    if token_ids.dtype != torch.int64 or token_ids.ndim != 1:
        raise ValueError(
            "a chunk's token ids must be one int64 row (tokens,); "
            f"got {tuple(token_ids.shape)} {token_ids.dtype}"
        )


def encoded(
    entry: Entry, codec: str, rope: RopeSpec | None = None
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Facts for the header and tensors for the file, by one of `CODECS`.

    ``int8`` and ``int4`` need the model's ``rope``. Entries other than `ChunkKV` stay as they are.
    """
    if codec not in CODECS:
        raise ValueError(f"unknown codec '{codec}'; available: {', '.join(CODECS)}")
    if codec == "as-is" or not isinstance(entry, ChunkKV):
        return {}, dict(entry.tensors())
    tensors, bits = {}, _BITS[codec]
    if bits:
        tensors = _rope_tensors(entry, rope)
        forms = [(one.start, one.interleaved) for one in rope.layers]
    for layer, (key, value) in enumerate(zip(entry.keys, entry.values, strict=True)):
        if bits:
            form = LayerRope(tensors[f"rope.{layer}"], *forms[layer])
            key = _turned(key, entry.origin, form, -1).transpose(1, 2)
        for name, tensor in ((f"key.{layer}", key), (f"value.{layer}", value)):
            parts = _pack(tensor, bits) if bits else _scale(tensor)
            tensors |= {f"{name}.{part}": held.contiguous() for part, held in parts.items()}
    dims = [(key.shape[2], value.shape[2]) for key, value in zip(entry.keys, entry.values)]  # noqa: B905
    dtype = str(entry.dtype).removeprefix("torch.")
    facts = {"codec": codec, "dtype": dtype, "dims": json.dumps(dims)}
    return facts | ({"rope": json.dumps(forms)} if bits else {}), tensors


def decoded(header: Mapping[str, str], read: Read, num_tokens: int) -> Read:
    """Reads decoded tensors, given how to ``read`` those of the file; raises as that does."""
    codec = header.get("codec", "as-is")
    if codec == "as-is":
        return read
    if codec not in CODECS:
        raise ValueError(f"it is stored by the unknown codec '{codec}'")
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
        return _turned(key, int(header["origin"]), form, 1).to(dtype).contiguous()

    return decode


def round_trip(entry: Entry, codec: str, rope: RopeSpec | None = None) -> Entry:
    """The entry as a file of this codec gives it back."""
    facts, tensors = encoded(entry, codec, rope)
    if not facts:
        return entry
    facts |= {name: str(fact) for name, fact in entry.facts().items()}
    read = decoded(facts, tensors.__getitem__, entry.num_tokens)
    return type(entry).restore(facts, read, entry.token_ids, entry.fingerprint)


def _scale(tensor: Tensor) -> dict[str, Tensor]:
    """Eight-bit floats with one scale per head, ``(K, 1, 1)``."""
    top = tensor.float().abs().amax(dim=(1, 2), keepdim=True)
    scale = (top / torch.finfo(FP8).max).clamp_min(1e-12)
    return {"codes": (tensor.float() / scale).to(FP8), "scale": scale}


def _pack(tensor: Tensor, bits: int) -> dict[str, Tensor]:
    """Integers with a scale and an offset for each group along the last axis.

    Source: KIVI, arXiv:2402.02750: keys by channel (here also before rotation, as KVQuant,
    arXiv:2401.18079), values by token.
    """
    length = tensor.shape[-1]
    group = -(-length // -(-length // GROUP[bits]))  # equal groups: little is filled up
    group += group % 2
    last = tensor[..., -1:].expand(*tensor.shape[:-1], -length % group)
    groups = torch.cat((tensor, last), dim=-1).float().unflatten(-1, (-1, group))
    low, high = groups.aminmax(dim=-1, keepdim=True)
    held = torch.float16 if float(groups.abs().max()) < _HALF_LIMIT else torch.float32
    low = low.to(held)
    scale = ((high - low.float()) / (2**bits - 1)).clamp_min(6e-5).to(held)
    codes = ((groups - low.float()) / scale.float()).round().clamp(0, 2**bits - 1).to(torch.uint8)
    if bits == 4:
        codes = codes[..., ::2] | codes[..., 1::2] << 4
    return {"codes": codes, "scale": scale, "low": low}


def _unpack(parts: Mapping[str, Tensor], bits: int, length: int) -> Tensor:
    codes = parts["codes"]
    if bits == 4:
        codes = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)
    return (codes * parts["scale"].float() + parts["low"].float()).flatten(-2)[..., :length]


def _rope_tensors(entry: ChunkKV, rope: RopeSpec | None) -> dict[str, Tensor]:
    if rope is None:
        raise ValueError(
            "int8 and int4 quantise keys before their rotation and need the model's frequencies; "
            "open the store through an engine, or use fp8"
        )
    # Where the values are what is rotated, keys are as they are.
    kept = [one.inv_freq[: 0 if one.in_values else None] for one in rope.layers]
    return {f"rope.{layer}": one.float().cpu().clone() for layer, one in enumerate(kept)}


def _turned(keys: Tensor, origin: int, rope: LayerRope, sign: int) -> Tensor:
    """Keys ``(K, S, D)`` without their rotation (-1), or with it (1)."""
    positions = torch.arange(origin, origin + keys.shape[1], device=keys.device)[None]
    return relocate_keys(keys.float()[None], sign * positions, rope)[0]
