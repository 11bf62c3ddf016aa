"""An entry for what is not a chunk: exact prompts, embeddings, answers; and a search among them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from blocktune.cache.chunk_kv import Entry, Read
from blocktune.cache.fingerprint import chunk_key
from blocktune.cache.store import ChunkStore


@dataclass(frozen=True, eq=False)
class Record(Entry):
    """Tensors of any shape, kept as they are by every codec, and found by what they belong to."""

    kind: ClassVar[str] = "record"
    data: tuple[Tensor, ...]  # the tensors
    token_ids: Tensor  # what it is the record of: token ids, or the bytes of a text, ``(S,)`` int64
    fingerprint: str  # hex digest of what made it

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """See `Entry.tensors`."""
        yield from ((f"data.{index}", tensor) for index, tensor in enumerate(self.data))

    def facts(self) -> dict[str, int]:
        """See `Entry.facts`."""
        return {"num_tensors": len(self.data)}

    @classmethod
    def restore(cls, facts: Mapping, read: Read, token_ids: Tensor, fingerprint: str) -> Self:
        """See `Entry.restore`."""
        count = int(facts["num_tensors"])
        return cls(tuple(read(f"data.{index}") for index in range(count)), token_ids, fingerprint)


def keep(store: ChunkStore, key: str, record: Record, **about: Any) -> bool:
    """Puts a record; False if it is larger than the memory and there is no folder."""
    try:
        store.put(key, record, **about)
    except ValueError:
        return False
    return True


def text_bytes(text: str) -> Tensor:
    """A text as `Record.token_ids`."""
    return torch.tensor(list(text.encode(errors="replace")), dtype=torch.int64)


class Hit(NamedTuple):
    """A record that `Nearest` found: its key, its size in tokens and its cosine similarity."""

    key: str
    num_tokens: int
    similarity: float


class Nearest:
    """Keys of records by their embeddings: the latest ``most``, compared one by one.

    The list is a record itself, so that other processes start with it. Of two changes at once one
    is lost: what it listed is not found, never found wrong.

    Args:
        store: Where the list is kept.
        scope: Hex digest of what may share records: model, tenant and purpose.
        most: Longest list.
    """

    def __init__(self, store: ChunkStore, scope: str, most: int = 1024):
        self.store, self.scope, self.most = store, scope, most
        self._key = chunk_key(scope, (), {"list": True})

    def find(self, vector: Tensor, count: int = 1) -> list[Hit]:
        """The ``count`` records closest to a vector ``(D,)`` of length 1, closest first."""
        if (lists := self._lists()) is None:
            return []
        vectors, sizes, keys = lists
        best = (vectors @ vector).topk(min(count, len(sizes)))
        return [
            Hit(bytes(keys[i].tolist()).hex(), int(sizes[i]), score)
            for score, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]

    def add(self, key: str, num_tokens: int, vector: Tensor) -> None:
        """Lists a record, last, once."""
        row = torch.tensor(list(bytes.fromhex(key)), dtype=torch.uint8)[None]
        made, old = (vector[None], torch.tensor([num_tokens]), row), self._lists()
        if old is not None:
            others = (old[2] != row).any(1)
            pairs = zip(old, made, strict=True)
            made = tuple(torch.cat([kept[others], one])[-self.most :] for kept, one in pairs)
        ids = torch.empty(0, dtype=torch.int64)
        keep(self.store, self._key, Record(made, ids, self.scope))

    def _lists(self) -> tuple[Tensor, ...] | None:
        """Vectors ``(N, D)``, sizes ``(N,)`` and keys ``(N, 32)``."""
        found = self.store.get(self._key, (), self.scope, Record)
        return None if found is None else tuple(tensor.cpu() for tensor in found.data)
