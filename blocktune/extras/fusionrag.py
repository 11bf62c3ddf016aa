"""FusionRAG: each chunk is encoded after the known chunks that are most like it."""

from __future__ import annotations

import heapq
import math
import threading
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

from blocktune.methods import (
    Method,
    PromptHistory,
    QueryAttention,
    Selection,
    register,
    require_count,
)
from blocktune.prompt import LayoutSpec

if TYPE_CHECKING:
    from blocktune.cache import ChunkStore
    from blocktune.methods import PrefilledBatch, ServedModel
    from blocktune.prompt import Pieces

Ids = tuple[int, ...]
MOST = 4096  # chunks that are remembered; the one that was not asked for the longest leaves first


class KnownChunks:
    """The chunks that a store was asked for in this process: the knowledge base, as far as known.

    Likeness counts the tokens that two chunks share, each by ``log(1 + chunks / chunks with it)``,
    over the root of the product of their numbers of different tokens.
    """

    def __init__(self) -> None:
        self._chunks: dict[Ids, frozenset[int]] = {}
        self._having: dict[int, set[Ids]] = defaultdict(set)
        self._lock = threading.Lock()

    @classmethod
    def of(cls, store: ChunkStore, fingerprint: str) -> Self:
        """The one of a store and model."""
        return store.note((cls, fingerprint), cls)

    def add(self, chunks: Sequence[Ids]) -> None:
        """Remembers chunks."""
        with self._lock:
            for chunk in chunks:
                tokens = self._chunks.pop(chunk, None) or frozenset(chunk)
                self._chunks[chunk] = tokens
                for token in tokens:
                    self._having[token].add(chunk)
            for oldest in list(self._chunks)[: max(0, len(self._chunks) - MOST)]:
                for token in self._chunks.pop(oldest):
                    self._having[token].discard(oldest)

    def like(self, chunk: Ids, most: int) -> list[Ids]:
        """Other chunks that share a token with this one, the most similar first."""
        with self._lock:
            shared: dict[Ids, float] = defaultdict(float)
            for token in self._chunks[chunk]:
                weight = math.log1p(len(self._chunks) / len(self._having[token]))
                for other in self._having[token]:
                    shared[other] += weight
            shared.pop(chunk)
            scores = {o: score / math.sqrt(len(self._chunks[o])) for o, score in shared.items()}
        # Of equals the same one, whatever was asked first.
        return heapq.nsmallest(most, scores, key=lambda other: (-scores[other], other))


@dataclass(frozen=True)
class Neighbours(PromptHistory):
    """Serves every chunk as encoded after the prompt's prefix and its ``most`` neighbours."""

    begins_in_full: ClassVar[bool] = False
    most: int

    def lookup(
        self, store: ChunkStore, fingerprint: str, pieces: Pieces, model: ServedModel
    ) -> list[Ids]:
        known = KnownChunks.of(store, fingerprint)
        known.add(pieces.chunks)
        found = (known.like(chunk, self.most) for chunk in pieces.chunks)
        return [sum(like, pieces.prefix) for like in found]

    def update(self, store: ChunkStore, fingerprint: str, batch: PrefilledBatch) -> None:
        """Learns nothing: `lookup` has seen the chunks."""


@register("fusionrag")
class FusionRAG(Method):
    """Encodes each chunk after its likely neighbours, drops those, and recomputes a few tokens.

    Neighbours are the ``neighbours`` most similar chunks of those that the process has served so
    far, this prompt's included: serve or encode a corpus by this method first, as the paper's
    offline stage does; a chunk whose neighbours change is encoded again. Recomputed are the tokens
    that the question attends to most in the last layer. The paper finds neighbours by embeddings
    (BGE-M3) and lets a chunk see them as each was encoded alone; here they share rare tokens and
    see each other. Its asynchronous loading and kernels are not part of the method.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2601.12904"
    # Other known chunks come before it.
    exact_on_one_chunk: ClassVar[bool] = False
    neighbours: int = 10
    ratio: float = 0.15

    def __post_init__(self):
        require_count("neighbours", self.neighbours)

    @property
    def history(self) -> Neighbours:
        return Neighbours(self.neighbours)

    def layout(self, spec: LayoutSpec) -> LayoutSpec:
        return replace(
            spec, block=True, num_blanks=0, shared_prefix=False, bos="none", placement="sequential"
        )

    def select(self) -> Selection:
        return QueryAttention(ratio=self.ratio, fuse="last", over="chunks")
