"""Which variants of chunks there are, and which to take in a new prompt; learns online."""

from __future__ import annotations

import hashlib
import threading
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch

from blocktune.cache.craft import cache_fix_overhead
from blocktune.cache.fingerprint import chunk_key, key_after
from blocktune.cache.store import ChunkStore
from blocktune.cache.variants import ChunkVariants, Ids, Variant


class Recall(NamedTuple):
    """How a method lives on earlier prompts.

    Attributes:
        refresh: A prompt of which a greater share of the chunks' tokens would be recomputed is
            computed in full: its chunks are then known in this context too.
        most: Variants that are kept of one chunk.
        alpha: Of `cache_fix_overhead`.
    """

    refresh: float
    most: int
    alpha: float

    @property
    def exact_alone(self) -> bool:
        """Whether one chunk with nothing before it is always computed in full, or never leant.

        The least fix overhead of a chunk that leant on what is missing is ``alpha / 2``.
        """
        return self.refresh < self.alpha / 2


class Recalled(NamedTuple):
    """The variant that a chunk is served from, and the share of its tokens to recompute."""

    variant: Variant
    overhead: float


class VariantStore:
    """Statistics of chunk variants, kept in the same store as the chunks.

    Two processes over one folder see each other's variants; of two that learn of one chunk at the
    same moment, one is forgotten. Use counts live as long as the process.

    Args:
        store: Holds the statistics, and the keys and values they speak of.
        fingerprint: Of the model.
    """

    def __init__(self, store: ChunkStore, fingerprint: str):
        self.store, self.fingerprint = store, fingerprint
        self._uses: Counter[tuple[Ids, Ids]] = Counter()
        self._lock = threading.Lock()

    def recall(self, chunk: Ids, context: Sequence[Ids], alpha: float = 1.0) -> Recalled | None:
        """The variant with the least to recompute after ``context``; None if there is none.

        Of equals, the latest.

        Args:
            chunk: Its tokens, as stored.
            context: Those of the chunks before it in the new prompt, in order.
            alpha: Of `cache_fix_overhead`.
        """
        found = self._find(chunk)
        if found is None:
            return None
        costs = [cache_fix_overhead(v, len(chunk), context, alpha) for v in found.variants]
        best = min(range(len(costs)), key=lambda index: (costs[index], -index))
        return Recalled(found.variants[best], costs[best])

    def of(self, chunk: Ids, ghosts: Ids) -> Variant | None:
        """The variant that was encoded after exactly ``ghosts``, or None."""
        found = self._find(chunk)
        same = [v for v in found.variants if v.ghosts == ghosts] if found else []
        return same[0] if same else None

    def used(self, chunk: Ids, ghosts: Ids) -> None:
        """Counts a use: what is used least makes room for what is new."""
        with self._lock:
            self._uses[chunk, ghosts] += 1

    def learn(self, chunk: Ids, variant: Variant, most: int) -> None:
        """Remembers a variant, in place of one in the same context or of the least used one.

        The keys and values of one that leaves are dropped too, unless it had no context: so
        encoded a chunk serves other methods.

        Args:
            chunk: Its tokens, as stored.
            variant: What to remember.
            most: Variants of the chunk that are kept, this one included.
        """
        with self._lock:
            found = self._find(chunk)
            known = [v for v in found.variants if v.ghosts != variant.ghosts] if found else []
            while len(known) >= most:
                least = min(known, key=lambda v: self._uses[chunk, v.ghosts])
                known.remove(least)
                if least.context:
                    self.store.discard(key_after(self.fingerprint, chunk, least.ghosts))
            entry = ChunkVariants((*known, variant), torch.tensor(chunk), self.fingerprint)
            self.store.put(self._key(chunk), entry)

    def _find(self, chunk: Ids) -> ChunkVariants | None:
        return self.store.get(self._key(chunk), chunk, self.fingerprint, ChunkVariants)

    def _key(self, chunk: Ids) -> str:
        key = chunk_key(self.fingerprint, chunk)
        return hashlib.sha256(f"{key} variants".encode()).hexdigest()
