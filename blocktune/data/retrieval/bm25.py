"""BM25 over chunks, by the library bm25s."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from blocktune.prompt.format import Chunk


class Hit(NamedTuple):
    """A chunk's number in the corpus, and its score."""

    index: int
    score: float


class Bm25:
    """An index over chunks, titles included.

    Args:
        chunks: At least one.
        k1: How soon more of the same word stops counting.
        b: How much long chunks are discounted.

    Raises:
        ValueError: If there is no chunk.

    Source: Lucene's variant, as bm25s has it (arXiv:2407.03618); English stop words are dropped.
    """

    def __init__(self, chunks: Sequence[Chunk], k1: float = 1.5, b: float = 0.75):
        import bm25s

        if not chunks:
            raise ValueError("a BM25 index needs at least one chunk, got none")
        self.chunks = list(chunks)
        self._bm25s = bm25s
        self._index = bm25s.BM25(k1=k1, b=b)
        texts = [f"{chunk.title or ''} {chunk.text}" for chunk in chunks]
        self._index.index(self._tokens(texts), show_progress=False)

    def search(self, questions: Sequence[str], k: int) -> list[list[Hit]]:
        """The ``k`` best chunks of each question (all, if there are fewer), best first.

        Equal scores keep the order of the corpus.
        """
        return [self._best(question, k) for question in questions]

    def _best(self, question: str, k: int) -> list[Hit]:
        (words,) = self._tokens([question], as_ids=False)
        scores = self._index.get_scores(words) if words else np.zeros(len(self.chunks))
        # All that reach the k-th score, so that equal ones keep the order of the corpus.
        k = min(k, len(scores))
        (near,) = np.nonzero(scores >= -np.partition(-scores, k - 1)[k - 1])
        order = near[np.argsort(-scores[near], kind="stable")][:k]
        return [Hit(int(index), float(scores[index])) for index in order]

    def _tokens(self, texts: list[str], as_ids: bool = True):
        return self._bm25s.tokenize(
            texts, stopwords="en", return_ids=as_ids, show_progress=False, allow_empty=True
        )


def rank(question: str, chunks: Sequence[Chunk]) -> list[int]:
    """Indices of the chunks, best first by BM25 among themselves."""
    (hits,) = Bm25(chunks).search([question], len(chunks))
    return [hit.index for hit in hits]
