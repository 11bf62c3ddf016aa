"""Passages for questions that have none, and the best of those that have too many."""

from blocktune.data.retrieval.bm25 import Bm25, Hit, rank
from blocktune.data.retrieval.passages import (
    Question,
    Retrieved,
    from_corpus,
    from_own,
    from_retriever,
    read_questions,
    read_retrieved,
)

__all__ = [
    "Bm25",
    "Hit",
    "Question",
    "Retrieved",
    "from_corpus",
    "from_own",
    "from_retriever",
    "rank",
    "read_questions",
    "read_retrieved",
]
