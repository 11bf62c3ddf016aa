"""Entries of a store: a chunk's keys and values, or its hidden states."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from blocktune.cache.store.config import Tier

Read = Callable[[str], Tensor]  # returns the tensor with the given name
Ids = Sequence[int] | Tensor  # token ids, (S,)
State = tuple[Tensor | None, ...]  # recurrent state of one prompt at some depth, layer by layer


class Entry(ABC):
    """One chunk's tensors of one kind. Tensors are shared: never write into them."""

    kind: ClassVar[str]  # name of the kind, in the file's header
    token_ids: Tensor  # the encoded tokens, ``(S,)`` int64
    fingerprint: str  # hex digest of the model that encoded it, `model_fingerprint`

    @abstractmethod
    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yields names and tensors, without the token ids."""

    @abstractmethod
    def facts(self) -> dict[str, int]:
        """The numbers that `restore` needs besides the tensors."""

    @classmethod
    @abstractmethod
    def restore(cls, facts: Mapping, read: Read, token_ids: Tensor, fingerprint: str) -> Self:
        """Inverse of `facts` and `tensors`. Raises KeyError or ValueError if they do not fit."""

    @property
    def num_tokens(self) -> int:
        """Number of stored tokens."""
        return self.token_ids.shape[0]

    @cached_property
    def num_bytes(self) -> int:
        """Size in bytes of all tensors and the token ids."""
        return sum(tensor.nbytes for _, tensor in self.tensors()) + self.token_ids.nbytes

    def matches(self, token_ids: Ids, fingerprint: str) -> bool:
        """Whether this is the state of exactly these tokens under exactly this model."""
        if fingerprint != self.fingerprint:
            return False
        if token_ids is vars(self).get("_matched"):  # the same object: ids of a text are cached
            return True
        own = self.token_ids.cpu()
        if isinstance(token_ids, Tensor):
            return torch.equal(token_ids.to("cpu", torch.int64), own)
        same = own.numpy().tobytes() == array("q", token_ids).tobytes()  # faster than a tensor
        if same and isinstance(token_ids, tuple):
            vars(self)["_matched"] = token_ids
        return same

    def to(self, device: torch.device | str) -> Self:
        """Moves the tensors to a device. Token ids stay on the CPU."""
        return self.map(lambda tensor: tensor.to(device))

    def compact(self) -> Self:
        """Copies tensors that are views, so that a chunk does not keep its batch in memory."""
        return self.map(compact)

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """A copy with ``function`` applied to every tensor."""
        tensors, ids = dict(self.tensors()), compact(self.token_ids.cpu())
        return self.restore(self.facts(), lambda n: function(tensors[n]), ids, self.fingerprint)


class Lookup(NamedTuple):
    """The result of one lookup in the store, and its cost."""

    kv: Entry | None  # None: a miss; encode the chunk and `ChunkStore.put` it
    tier: Tier  # where it was found
    bytes_read: int  # of keys, values and ids; 0 on a miss
    lookup_s: float  # seconds until the entry was located, or missed
    load_s: float  # seconds spent reading, verifying and moving it
    reason: str = ""  # why a stored entry could not be used


def named(keys: Sequence[Tensor], values: Sequence[Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yields ``key.0``, ``value.0``, ``key.1`` and so on, layer by layer."""
    for layer, (key, value) in enumerate(zip(keys, values, strict=True)):
        yield f"key.{layer}", key
        yield f"value.{layer}", value


def read_layers(facts: Mapping, read: Read) -> Iterator[tuple[Tensor, ...]]:
    """Inverse of `named`: yields the keys, then the values, of ``num_layers`` layers."""
    for kind in ("key", "value"):
        yield tuple(read(f"{kind}.{layer}") for layer in range(int(facts["num_layers"])))


def compact(tensor: Tensor) -> Tensor:
    """The tensor, copied if it is a view or not contiguous."""
    if tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


@dataclass(frozen=True, eq=False)
class ChunkKV(Entry):
    """The attention state of one encoded chunk.

    Keys and values are ``(K, S, D)`` for each layer that stores any; ``K`` may differ between
    layers, ``D`` also within one. RoPE is applied at positions ``origin .. origin + S - 1``.
    """

    kind: ClassVar[str] = "chunk"
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    token_ids: Tensor  # ``(S,)`` int64, without the blanks before it
    fingerprint: str
    origin: int = 0  # position of the first stored token, e.g. the number of blanks before it

    def __post_init__(self):
        ids = self.token_ids
        if ids.dtype != torch.int64 or ids.ndim != 1 or not len(ids):
            given = f"{tuple(ids.shape)} {ids.dtype}"
            raise ValueError(f"token ids are one int64 row of at least one token; got {given}")
        if not re.fullmatch("[0-9a-f]+", self.fingerprint) or self.origin < 0:
            given = f"{self.fingerprint!r}, {self.origin}"
            raise ValueError(f"a chunk has a lower-case hex digest and an origin >= 0; got {given}")
        fits = len(self.keys) == len(self.values) > 0
        for key, value in zip(self.keys, self.values, strict=False):
            fits &= key.ndim == value.ndim == 3 and key.shape[:2] == value.shape[:2]
            fits &= key.shape[1:2] == ids.shape
            fits &= key.dtype == value.dtype == self.dtype
        if not fits or not self.dtype.is_floating_point:
            given = [f"{tuple(t.shape)} {t.dtype}" for t in (*self.keys, *self.values)]
            raise ValueError(
                "each layer of a chunk has keys and values, (kv heads, tokens, head dim) of one "
                f"floating dtype, for {self.num_tokens} tokens; got {', '.join(given)}"
            )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of all keys and values."""
        return self.keys[0].dtype

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        return named(self.keys, self.values)

    def facts(self) -> dict[str, int]:
        return {"num_layers": len(self.keys), "origin": self.origin}

    @classmethod
    def restore(cls, facts: Mapping, read: Read, token_ids: Tensor, fingerprint: str) -> Self:
        return cls(*read_layers(facts, read), token_ids, fingerprint, int(facts["origin"]))


@dataclass(frozen=True, eq=False)
class ChunkStates(Entry):
    """Hidden states of a chunk, computed alone, at the input of a layer that a method starts from.

    All tokens of that layer can be recomputed from them (DroidSpeak's E-cache, arXiv:2411.02820).
    """

    kind: ClassVar[str] = "states"
    states: Tensor  # ``(S, hidden)``, before the layer's norm: independent of positions
    layer: int  # 0-based index of the layer whose input they are
    token_ids: Tensor  # ``(S,)`` int64, without the blanks before it
    fingerprint: str

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield "states", self.states

    def facts(self) -> dict[str, int]:
        return {"layer": self.layer}

    @classmethod
    def restore(cls, facts: Mapping, read: Read, token_ids: Tensor, fingerprint: str) -> Self:
        return cls(read("states"), int(facts["layer"]), token_ids, fingerprint)
