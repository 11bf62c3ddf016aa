"""Recycled prompts: the nearest earlier one by sentence embedding, if it is an exact prefix.

Source: KV Cache Recycling, arXiv:2512.11851. The embedding only proposes a prompt; the token test
decides. A `PrefixTree` finds the longest prefix of all by tokens alone and needs no embedding;
recycling keeps whole prompts on every tier of a `ChunkStore`, so that they survive the process.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from types import SimpleNamespace

import torch
from torch import Tensor

from blocktune.cache.exact import ExactKV, PrefixMatch
from blocktune.cache.fingerprint import chunk_key
from blocktune.cache.records import Embedder, Nearest, Record, keep
from blocktune.cache.store import ChunkStore

Ids = tuple[int, ...]


class Recycler:
    """Whole prompts in a store, matched and inserted as in a `PrefixTree`.

    ``read`` turns token ids into the text that ``embed`` embeds. The nearest ``candidates`` are
    tested; the paper tests one.
    """

    def __init__(
        self,
        store: ChunkStore,
        read: Callable[[Sequence[int]], str],
        embed: Embedder,
        candidates: int = 1,
    ):
        self.store, self.read, self.embed, self.candidates = store, read, embed, candidates

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

    def _run(self, fingerprint: str, ids: Ids) -> SimpleNamespace | None:
        """A stored prompt, as `PrefixMatch` reads it."""
        found = self.store.get(self._key(fingerprint, ids), ids, fingerprint, Record)
        if found is None:
            return None
        half, facts = len(found.data) // 2, {"token_ids": ids, "num_bytes": found.num_bytes}
        return SimpleNamespace(keys=found.data[:half], values=found.data[half:], **facts)

    def _list(self, fingerprint: str) -> Nearest:
        scope = hashlib.sha256(f"{fingerprint} {self.embed.fingerprint}".encode()).hexdigest()
        return Nearest(self.store, scope)

    def _key(self, fingerprint: str, ids: Ids) -> str:
        return chunk_key(fingerprint, ids, {"recycled": True})

    def _vector(self, ids: Ids) -> Tensor:
        return self.embed([self.read(ids)])[0]
