"""FusionRAG: each chunk is encoded after the known chunks that are most similar to it."""

from __future__ import annotations

import heapq
import math
import threading
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from blocktune.methods import (
    Method,
    PromptHistory,
    QueryAttention,
    Selection,
    register,
    require_count,
)
from blocktune.methods.base import encoded_alone
from blocktune.prompt import LayoutSpec

if TYPE_CHECKING:
    from blocktune.cache import ChunkStore
    from blocktune.methods import PrefilledBatch, ServedModel
    from blocktune.prompt import Pieces

Ids = tuple[int, ...]
MOST = 4096  # chunks that are remembered; the least recently requested is dropped first


class KnownChunks:
    """The chunks that this process has requested of a store: the known part of the knowledge base.

    Two chunks are as similar as the sum of ``log(1 + chunks / chunks with the token)`` over their
    common tokens, divided by the geometric mean of their numbers of distinct tokens.
    """

    def __init__(self) -> None:
        self._chunks: dict[Ids, frozenset[int]] = {}
        self._with_token: dict[int, set[Ids]] = defaultdict(set)
        self._lock = threading.Lock()

    @classmethod
    def of(cls, store: ChunkStore, fingerprint: str) -> Self:
        """The instance of a store and model."""
        return store.memoized((cls, fingerprint), cls)

    def add(self, chunks: Sequence[Ids]) -> None:
        """Remembers chunks as the most recently requested."""
        with self._lock:
            for chunk in chunks:
                tokens = self._chunks.pop(chunk, None) or frozenset(chunk)
                self._chunks[chunk] = tokens
                for token in tokens:
                    self._with_token[token].add(chunk)
            while len(self._chunks) > MOST:
                oldest = next(iter(self._chunks))
                for token in self._chunks.pop(oldest):
                    self._with_token[token].discard(oldest)
                    if not self._with_token[token]:
                        del self._with_token[token]

    def like(self, chunk: Ids, most: int) -> list[Ids]:
        """Other chunks that share a token with this one, the most similar first."""
        with self._lock:
            shared: dict[Ids, float] = defaultdict(float)
            for token in self._chunks[chunk]:
                weight = math.log1p(len(self._chunks) / len(self._with_token[token]))
                for other in self._with_token[token]:
                    shared[other] += weight
            shared.pop(chunk)
            scores = {o: score / math.sqrt(len(self._chunks[o])) for o, score in shared.items()}
        # Ties are broken by the tokens, so that the order of requests does not matter.
        return heapq.nsmallest(most, scores, key=lambda other: (-scores[other], other))


@dataclass(frozen=True)
class Neighbours(PromptHistory):
    """Serves every chunk as encoded after the prompt's prefix and its ``most`` neighbours."""

    begins_in_full: ClassVar[bool] = False
    watches_chunks: ClassVar[bool] = False
    most: int

    def lookup(
        self, store: ChunkStore, fingerprint: str, pieces: Pieces, model: ServedModel
    ) -> list[Ids]:
        known = KnownChunks.of(store, fingerprint)
        known.add(pieces.chunks)
        contexts = []
        for chunk in pieces.chunks:
            context = pieces.prefix
            for other in known.like(chunk, self.most):
                if len(context) + len(other) + len(chunk) <= model.max_tokens:
                    context += other
            contexts.append(context)
        return contexts

    def update(self, store: ChunkStore, fingerprint: str, batch: PrefilledBatch) -> None:
        """Learns nothing more: `lookup` has added the chunks."""


@register("fusionrag")
class FusionRAG(Method):
    """Encodes each chunk after its likely neighbours, drops those, and recomputes a few tokens.

    They are the ``neighbours`` most similar chunks among those that the process has served so far,
    including this prompt's: first serve a corpus by this method, as in the paper's offline stage.
    One that does not fit into the context is left out. A chunk whose neighbours change is encoded
    again. Then the tokens that the question attends to most in the last layer are recomputed, by
    weights over all chunks at their places in the prompt (in the paper chunk by chunk, free of
    position). The paper finds neighbours by embeddings (BGE-M3), each encoded alone; here they are
    chunks with common rare tokens, and see each other.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2601.12904"
    neighbours: int = 10
    ratio: float = 0.15

    def __post_init__(self):
        require_count("neighbours", self.neighbours)

    @property
    def history(self) -> Neighbours:
        return Neighbours(self.neighbours)

    def layout(self, spec: LayoutSpec) -> LayoutSpec:
        return encoded_alone(spec, placement="sequential")

    def select(self) -> Selection:
        return QueryAttention(ratio=self.ratio, fuse="last", over="chunks")
