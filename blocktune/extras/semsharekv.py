"""SemShareKV: takes keys and values, token by token, from a similar earlier prompt."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import TYPE_CHECKING, ClassVar

from blocktune.cache.store.config import keep_latest
from blocktune.methods import (
    ChunkLoader,
    Deviation,
    Method,
    PromptHistory,
    Selection,
    register,
    require_count,
    require_share,
)
from blocktune.methods.base import encoded_alone
from blocktune.prompt import LayoutSpec

if TYPE_CHECKING:
    from torch import Tensor

    from blocktune.cache import ChunkKV, ChunkStore, Lookup
    from blocktune.cache.store.records import Record
    from blocktune.methods import PrefilledBatch, ServedModel
    from blocktune.prompt import Pieces

Ids = tuple[int, ...]
BITS, BASE = 256, 10_000.0
"""Random hyperplanes of a token's signature, and the base of the rotation before it."""
MOST = 256  # most chunks that are announced by `lookup` and not yet built
REFERENCE = {"reference": True}  # tells the key of an earlier prompt from that of a chunk


def signatures(ids: Ids, model: ServedModel) -> Tensor:
    """On which side of random hyperplanes each rotated embedding is, ``(S, BITS)`` of +-1."""
    import torch

    from blocktune.positions import LayerRope, relocate_keys

    device = model.embed.weight.device
    vectors = model.embed(torch.tensor(ids, device=device)).detach().float()
    half = vectors.shape[1] // 2
    rope = LayerRope(BASE ** (-torch.arange(half) / half))
    rotated = relocate_keys(vectors[None, None], torch.arange(len(ids))[None], rope)[0, 0]
    planes = torch.randn(len(vectors[0]), BITS, generator=torch.Generator().manual_seed(0))
    return torch.where(rotated @ planes.to(device) > 0, 1.0, -1.0)


class References(ChunkLoader):
    """Earlier prompts of one model, latest last, and chunks built from them or from the store."""

    def __init__(self, store: ChunkStore):
        self.store = store
        self.prompts: dict[Ids, Tensor | None] = {}
        self.waiting: dict[str, Callable[[], ChunkKV]] = {}
        self.lock = threading.Lock()

    @classmethod
    def of(cls, store: ChunkStore, fingerprint: str) -> References:
        return store.memoized((cls, fingerprint), lambda: cls(store))

    def lookup(self, key: str, token_ids, fingerprint: str) -> Lookup:
        from blocktune.cache import Lookup

        started, make = time.perf_counter(), self.waiting.pop(key, None)
        if make is None:
            return self.store.lookup(key, token_ids, fingerprint)
        kv = make()
        return Lookup(kv, "memory", kv.num_bytes, 0.0, time.perf_counter() - started)

    def nearest(self, pieces: Pieces, model: ServedModel) -> tuple[float, Ids, Tensor] | None:
        """The most similar earlier prompt: similarity, tokens, and which of them match each token.

        Similarity is the mean over tokens of 1 for equal and about 0 for unrelated signatures.
        """
        import torch

        own, found = signatures(pieces.context, model), []
        with self.lock:
            prompts = list(self.prompts.items())
        for other, theirs in prompts:
            if theirs is None:
                self.prompts[other] = theirs = signatures(other, model)
            best = [(rows @ theirs.T).max(1) for rows in own.split(BITS)]  # never all by all
            values, matches = (torch.cat(kind) for kind in zip(*best, strict=True))
            found.append((float(values[len(pieces.prefix) :].mean() / BITS), other, matches))
        return max(found, key=itemgetter(0), default=None)


def assemble(record: Record, match: Tensor, chunk: Ids, start: int, model: ServedModel) -> ChunkKV:
    """A chunk at ``start``: each token has the state of its match, moved to its own position."""
    import torch

    from blocktune.cache import ChunkKV
    from blocktune.positions import relocate_keys

    rows = match[start : start + len(chunk)].to(record.data[0].device)
    shift = (torch.arange(start, start + len(chunk), device=rows.device) - rows)[None]
    states, half = [tensor[:, rows] for tensor in record.data], len(record.data) // 2
    for layer, rope in enumerate(model.rope.layers):
        index = layer + half * rope.in_values
        states[index] = relocate_keys(states[index][None], shift, rope)[0]
    keys, values = tuple(states[:half]), tuple(states[half:])
    return ChunkKV(keys, values, torch.tensor(chunk), record.fingerprint, start).compact()


@dataclass(frozen=True)
class FuzzyHistory(PromptHistory):
    """Serves a prompt from the most similar one, or in full if none is similar enough."""

    watches_chunks: ClassVar[bool] = False
    threshold: float
    references: int

    def lookup(
        self, store: ChunkStore, fingerprint: str, pieces: Pieces, model: ServedModel
    ) -> list[Ids] | None:
        from blocktune.cache import chunk_key, key_after
        from blocktune.cache.store.records import Record

        earlier = References.of(store, fingerprint)
        nearest = earlier.nearest(pieces, model) if pieces.chunks else None
        if nearest is None or nearest[0] < self.threshold:
            return None
        _, prompt, match = nearest
        record = store.get(chunk_key(fingerprint, prompt, REFERENCE), prompt, fingerprint, Record)
        if record is None:  # evicted
            earlier.prompts.pop(prompt, None)
            return None
        contexts, start = [], len(pieces.prefix)
        for index, chunk in enumerate(pieces.chunks):
            # The tokens before it: the chunk is encoded after them if it is not built in time.
            before = pieces._replace(chunks=pieces.chunks[:index]).context or chunk[:1]
            make = partial(assemble, record, match, chunk, start, model)
            with earlier.lock:
                keep_latest(earlier.waiting, key_after(fingerprint, chunk, before), make, MOST)
            contexts.append(before)
            start += len(chunk)
        return contexts

    def update(self, store: ChunkStore, fingerprint: str, batch: PrefilledBatch) -> None:
        import torch

        from blocktune.cache import chunk_key
        from blocktune.cache.store.records import Record, keep
        from blocktune.layout import GLOBAL

        earlier = References.of(store, fingerprint)
        for index, prompt in enumerate(batch.pieces):
            ids = prompt.context
            if not prompt.chunks or (batch.columns.group[index, : len(ids)] != GLOBAL).any():
                continue
            states = [(layer.keys, layer.values) for layer in batch.cache.layers]
            data = tuple(t[index, :, : len(ids)].clone() for kind in zip(*states) for t in kind)  # noqa: B905
            record = Record(data, torch.tensor(ids), fingerprint)
            if keep(store, chunk_key(fingerprint, ids, REFERENCE), record):
                with earlier.lock:
                    keep_latest(earlier.prompts, ids, earlier.prompts.get(ids), self.references)


@register("semsharekv")
class SemShareKV(Method):
    """Gives each token the state of its nearest in a similar earlier prompt; recomputes a share.

    Tokens are matched by locality-sensitive hashing of rotated embeddings. A prompt without a
    reference of similarity ``threshold`` is computed in full, and becomes one of the last
    ``references``. After the first layer, only the ``ratio`` of tokens that deviate most stay.

    From notes on the paper: rotation, one match per token, 0.8, 40 %. Ours: similarity is the mean
    correlation of signatures (there a scaled distance), and states are compared at layer 1, where
    context counts (there 0). Left out: tokens added by attention, and dropping keys.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2509.24832"
    ratio: float = 0.4
    threshold: float = 0.8
    references: int = 8
    warm_up: int = 0

    def __post_init__(self):
        require_share("threshold", self.threshold)
        require_count("references", self.references, least=1)
        require_count("warm_up", self.warm_up)

    @property
    def history(self) -> FuzzyHistory:
        return FuzzyHistory(self.threshold, self.references)

    def loader(self, store: ChunkStore, fingerprint: str) -> References:
        return References.of(store, fingerprint)

    def layout(self, spec: LayoutSpec) -> LayoutSpec:
        return encoded_alone(spec, placement="sequential")

    def select(self) -> Selection:
        return Deviation(ratio=self.ratio, by="both")
