"""Passages for questions that have none, and the best of those that have too many."""

from blocktune.data.retrieval.bm25 import Bm25, Hit, rank
from blocktune.data.retrieval.passages import (
    Retrieved,
    from_corpus,
    from_own,
    from_retriever,
    read_retrieved,
)
from blocktune.data.retrieval.questions import Question, read_questions

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
