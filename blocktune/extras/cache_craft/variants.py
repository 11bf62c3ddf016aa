"""Chunk variants: statistics, the share of each to recompute, and the choice of one."""

from __future__ import annotations

import hashlib
import math
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, combinations
from operator import itemgetter
from typing import ClassVar, Self

import torch
from torch import Tensor

from blocktune.cache import ChunkKV, ChunkStore, Entry, chunk_key, key_after
from blocktune.cache.chunk_kv import Read
from blocktune.cache.store.config import keep_latest
from blocktune.layout import GLOBAL, Kind
from blocktune.methods import PrefilledBatch, PromptHistory, ServedModel
from blocktune.prompt import Pieces

Ids = tuple[int, ...]
MOST = 1 << 16  # variants whose uses are counted; the least recently used is forgotten first


@dataclass(frozen=True, eq=False)
class Variant:
    """One context in which a chunk was computed; attention is a mean over heads and layers."""

    prefix: Ids  # tokens of the earlier prompt's prefix
    context: tuple[Ids, ...]  # the chunks between the prefix and this chunk, in order
    inter: Tensor  # attention of the chunk's tokens to each of these, summed, (len(context),)
    tokens: Tensor  # attention of each token to all of them, (S,)
    intra: float  # attention of the tokens to their own chunk, summed

    @property
    def blanks(self) -> Ids:
        """All tokens that the chunk was encoded after."""
        return tuple(chain(self.prefix, *self.context))


def cache_context_impact(variant: Variant, num_tokens: int) -> float:
    """CCI in [0.5, 1]: attention per pair of tokens to the earlier chunks, relative to its own."""
    pairs = zip(variant.inter.tolist(), variant.context, strict=True)
    outside = sum(mass / (num_tokens * len(chunk)) for mass, chunk in pairs)
    inside = variant.intra / num_tokens**2
    if inside == 0:
        return 1.0 if outside > 0 else 0.5
    return 1 / (1 + math.exp(-outside / inside))


def prefix_overlap(variant: Variant, context: Sequence[Ids]) -> float:
    """Beta: share in [0, 1] of the attention to old chunks that goes to those before it; else 1."""
    total = sum(variant.inter.tolist())
    if total <= 0:
        return 1.0
    kept = set(context)
    pairs = zip(variant.inter.tolist(), variant.context, strict=True)
    return sum(mass for mass, chunk in pairs if chunk in kept) / total


def order_penalty(old: Sequence[Ids], new: Sequence[Ids]) -> float:
    """Gamma in [0, 1]: share of pairs of common chunks in reverse order (Kendall).

    A chunk counts each time it occurs in the old context, at its first place in the new one.
    """
    common = [new.index(chunk) for chunk in old if chunk in new]
    pairs = list(combinations(common, 2))
    return sum(left > right for left, right in pairs) / len(pairs) if pairs else 0.0


def cache_fix_overhead(
    variant: Variant, num_tokens: int, context: Sequence[Ids], alpha: float = 1.0
) -> float:
    """CFO in [0, 1]: share of the chunk's tokens to recompute after the chunks of ``context``.

    ``alpha * CCI * (1 - beta * (1 - gamma))``, 0 in the variant's own; the paper tunes ``alpha``.
    """
    overlap = prefix_overlap(variant, context) * (1 - order_penalty(variant.context, context))
    impact = cache_context_impact(variant, num_tokens)
    return min(1.0, max(0.0, alpha * impact * (1 - overlap)))


@dataclass(frozen=True, eq=False)
class ChunkVariants(Entry):
    """All known variants of one chunk, ``token_ids`` ``(S,)``, the latest last; at least one."""

    kind: ClassVar[str] = "variants"
    variants: tuple[Variant, ...]
    token_ids: Tensor
    fingerprint: str

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for number, variant in enumerate(self.variants):
            lengths = [len(variant.prefix), *map(len, variant.context)]
            yield f"ghosts.{number}", torch.tensor(variant.blanks, dtype=torch.int64)
            yield f"lengths.{number}", torch.tensor(lengths)
            yield f"inter.{number}", variant.inter
            yield f"tokens.{number}", variant.tokens
            yield f"intra.{number}", torch.tensor([variant.intra], dtype=torch.float64)

    def facts(self) -> dict[str, int]:
        return {"num_variants": len(self.variants)}

    @classmethod
    def restore(cls, facts: Mapping, read: Read, token_ids: Tensor, fingerprint: str) -> Self:
        variants = []
        for number in range(int(facts["num_variants"])):
            blanks = read(f"ghosts.{number}")  # the name in existing stores
            pieces = blanks.split(read(f"lengths.{number}").tolist())
            prefix, *context = (tuple(piece.tolist()) for piece in pieces)
            inter, tokens = read(f"inter.{number}"), read(f"tokens.{number}")
            intra = float(read(f"intra.{number}"))
            variants.append(Variant(prefix, tuple(context), inter, tokens, intra))
        return cls(tuple(variants), token_ids, fingerprint)


class VariantStore:
    """Statistics of chunk variants, kept in the same store as the chunks.

    If two processes learn one of the same chunk at once, one is lost. Use counts are a process's.
    """

    def __init__(self, store: ChunkStore, fingerprint: str):
        self.store, self.fingerprint = store, fingerprint
        self._uses: Counter[str] = Counter()  # by the key of the variant's keys and values
        self._lock = threading.Lock()

    @classmethod
    def of(cls, store: ChunkStore, fingerprint: str) -> Self:
        """The instance of a store and model in this process, so that use counts are shared."""
        return store.memoized((cls, fingerprint), lambda: cls(store, fingerprint))

    def best(
        self, chunk: Ids, context: Sequence[Ids], alpha: float = 1.0
    ) -> tuple[float, Variant] | None:
        """The share to recompute after ``context``, and the variant where it is least."""
        known = self._known(chunk)[::-1]  # the latest of equal ones
        each = ((cache_fix_overhead(v, len(chunk), context, alpha), v) for v in known)
        return min(each, key=itemgetter(0), default=None)

    def find(self, chunk: Ids, blanks: Ids) -> Variant | None:
        """The variant that was encoded after exactly ``blanks``, or None."""
        return next((v for v in self._known(chunk) if v.blanks == blanks), None)

    def used(self, chunk: Ids, blanks: Ids) -> None:
        """Counts a use; the least used variant is replaced first."""
        key = key_after(self.fingerprint, chunk, blanks)
        with self._lock:
            keep_latest(self._uses, key, self._uses[key] + 1, MOST)

    def learn(self, chunk: Ids, variant: Variant, most: int) -> None:
        """Stores a variant, in place of one with the same context or of the least used of ``most``.

        A dropped one's keys and values are discarded too, if it had a context: others use the rest.
        """
        with self._lock:
            known = [v for v in self._known(chunk) if v.blanks != variant.blanks]
            while len(known) >= most:
                keys = [key_after(self.fingerprint, chunk, v.blanks) for v in known]
                key, least = min(zip(keys, known, strict=True), key=lambda v: self._uses[v[0]])
                known.remove(least)
                self._uses.pop(key, None)
                if least.context:
                    self.store.discard(key)
            entry = ChunkVariants((*known, variant), torch.tensor(chunk), self.fingerprint)
            self.store.put(self._key(chunk), entry)

    def _known(self, chunk: Ids) -> tuple[Variant, ...]:
        entry = self.store.get(self._key(chunk), chunk, self.fingerprint, ChunkVariants)
        return () if entry is None else entry.variants

    def _key(self, chunk: Ids) -> str:
        key = chunk_key(self.fingerprint, chunk)
        return hashlib.sha256(f"{key} variants".encode()).hexdigest()


@dataclass(frozen=True)
class VariantHistory(PromptHistory):
    """Serves every chunk from its best variant, and stores those of prompts computed in full."""

    refresh: float  # a prompt is computed in full if more than this share would be recomputed
    most: int  # variants kept per chunk
    alpha: float  # of `cache_fix_overhead`

    def without_selection(self) -> VariantHistory:
        return replace(self, refresh=1.0)  # full only if a chunk has no variant

    def lookup(
        self, store: ChunkStore, fingerprint: str, pieces: Pieces, model: ServedModel
    ) -> list[Ids] | None:
        variants, chunks = VariantStore.of(store, fingerprint), pieces.chunks
        choices = [variants.best(c, chunks[:i], self.alpha) for i, c in enumerate(chunks)]
        if None in choices:
            return None
        fresh = sum(share * len(c) for (share, _), c in zip(choices, chunks, strict=True))
        if fresh > self.refresh * sum(map(len, chunks)):
            return None
        for chunk, (_, variant) in zip(chunks, choices, strict=True):
            variants.used(chunk, variant.blanks)
        return [variant.blanks for _, variant in choices]

    def update(self, store: ChunkStore, fingerprint: str, batch: PrefilledBatch) -> None:
        variants, columns = VariantStore.of(store, fingerprint), batch.columns
        for index, prompt in enumerate(batch.pieces):
            blanks = prompt.prefix
            for number, chunk in enumerate(prompt.chunks):
                own = (columns.chunk[index] == number) & (columns.kind[index] == Kind.CHUNK)
                if int(columns.group[index][own][0]) != GLOBAL:
                    break
                kv = ChunkKV(
                    keys=tuple(layer.keys[index][:, own] for layer in batch.cache.layers),
                    values=tuple(layer.values[index][:, own] for layer in batch.cache.layers),
                    token_ids=torch.tensor(chunk),
                    fingerprint=fingerprint,
                    origin=len(blanks),
                ).compact()
                store.put(key_after(fingerprint, chunk, blanks), kv)
                attention = batch.chunk_attention[index, own].cpu()
                variant = Variant(
                    prefix=prompt.prefix,
                    context=prompt.chunks[:number],
                    inter=attention[:, :number].sum(0),
                    tokens=attention[:, :number].sum(1),
                    intra=float(attention[:, number].sum()),
                )
                variants.learn(chunk, variant, self.most)
                blanks = blanks + chunk
