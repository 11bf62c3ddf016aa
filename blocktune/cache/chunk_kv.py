"""The keys and values of one chunk, as every cache of blocktune holds them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

_HEX = re.compile(r"[0-9a-f]+")


@dataclass(frozen=True, eq=False)
class ChunkKV:
    """The attention state of one encoded chunk. Tensors are shared: never write into them.

    Attributes:
        keys: One tensor ``(K, S, D)`` per layer that stores any, RoPE applied at the positions
            ``origin .. origin + S - 1``. Layers may differ in ``K`` and ``D``.
        values: One tensor ``(K, S, D)`` per layer; ``D`` may differ from the keys'.
        token_ids: What was encoded, ``(S,)`` int64, without ghosts or shared prefix.
        fingerprint: Hex digest of the model that encoded it, `fingerprint.model_fingerprint`.
        origin: Position at which the first stored token was encoded, e.g. the number of
            ghosts before it. Relocation starts from here.

    Raises:
        ValueError: If the tensors do not describe one chunk.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    token_ids: Tensor
    fingerprint: str
    origin: int = 0

    def __post_init__(self):
        if not self.keys or len(self.keys) != len(self.values):
            raise ValueError(
                "a chunk's KV needs keys and values of the same layers, at least one; "
                f"got {len(self.keys)} key and {len(self.values)} value tensors"
            )
        if self.token_ids.dtype != torch.int64 or self.token_ids.ndim != 1:
            raise ValueError(
                "a chunk's token ids must be one int64 row (tokens,); "
                f"got {tuple(self.token_ids.shape)} {self.token_ids.dtype}"
            )
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
    def num_tokens(self) -> int:
        """Tokens stored, ghosts and shared prefix not counted."""
        return self.token_ids.shape[0]

    @property
    def num_layers(self) -> int:
        """Layers that store keys of their own."""
        return len(self.keys)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of all keys and values."""
        return self.keys[0].dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of keys, values and token ids: what it costs to hold or to read."""
        return sum(t.nbytes for t in (*self.keys, *self.values, self.token_ids))

    def matches(self, token_ids: Sequence[int] | Tensor, fingerprint: str) -> bool:
        """Whether this is the state of exactly these tokens under exactly this model."""
        wanted = torch.as_tensor(token_ids, dtype=torch.int64)
        return fingerprint == self.fingerprint and torch.equal(wanted.cpu(), self.token_ids.cpu())

    def to(self, device: torch.device | str) -> ChunkKV:
        """Moves keys and values; token ids stay where comparing is cheap, on the CPU."""
        return self._map(lambda tensor: tensor.to(device))

    def compact(self) -> ChunkKV:
        """Copies tensors that are views, so that holding a chunk never holds its batch."""
        return self._map(_own)

    def _map(self, function) -> ChunkKV:
        return replace(
            self,
            keys=tuple(map(function, self.keys)),
            values=tuple(map(function, self.values)),
            token_ids=_own(self.token_ids.cpu()),
        )


def _own(tensor: Tensor) -> Tensor:
    if tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)
