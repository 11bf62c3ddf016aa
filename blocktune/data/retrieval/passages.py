"""Examples out of questions and passages: from a corpus, a retriever's file, or their own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from blocktune.data.credit import DATA_SETS
from blocktune.data.example import RagExample, field_error, parse_chunk
from blocktune.data.retrieval.bm25 import Bm25, rank
from blocktune.data.retrieval.questions import Question
from blocktune.data.sources.files import read_records
from blocktune.prompt.chunk import Chunk


class Retrieved(NamedTuple):
    """Passages that a retriever found, best first, by question id and by question."""

    where: str
    by_id: Mapping[str, tuple[Chunk, ...]]
    by_question: Mapping[str, tuple[Chunk, ...]]

    def find(self, question: Question) -> tuple[Chunk, ...]:
        """The passages of a question.

        Raises:
            ValueError: If the file has none for it.
        """
        found = self.by_id.get(question.id) if question.id else None
        found = found or self.by_question.get(question.question)
        if not found:
            name = question.id or question.question
            raise ValueError(f"{self.where} has no passages for question '{name:.60}'")
        return found


def read_retrieved(path: str | Path) -> Retrieved:
    """Reads a retriever's output: a line a question, best passage first.

    A record has ``id`` or ``question`` (or both) and ``passages`` or ``ctxs``, a list of strings or
    ``{"text", "title"?}``; DPR's and FiD's files have that shape. Other fields are left alone.

    Raises:
        ValueError: If a record is wrong; names file, line and field.
    """
    by_id: dict[str, tuple[Chunk, ...]] = {}
    by_question: dict[str, tuple[Chunk, ...]] = {}
    for record in read_records(path):
        try:
            key, question, chunks = _retrieved(record.value)
        except ValueError as error:
            raise ValueError(f"{record.where}: {error}") from None
        if key:
            by_id[key] = chunks
        if question:
            by_question[question] = chunks
    return Retrieved(Path(path).name, by_id, by_question)


def from_corpus(questions: Iterable[Question], corpus: Sequence[Chunk], k: int) -> list[RagExample]:
    """The ``k`` best passages of a corpus by BM25, best first; ``meta`` holds their scores."""
    index = Bm25(corpus)
    questions = list(questions)
    found = index.search([question.question for question in questions], k)
    return [
        _example(
            question,
            tuple(index.chunks[hit.index] for hit in hits),
            {"retriever": "bm25", "scores": [round(hit.score, 4) for hit in hits]},
        )
        for question, hits in zip(questions, found, strict=True)
    ]


def from_retriever(
    questions: Iterable[Question], retrieved: Retrieved, k: int
) -> Iterator[RagExample]:
    """The first ``k`` passages that a retriever's file has for each question.

    Raises:
        ValueError: If it has none for one.
    """
    for question in questions:
        yield _example(question, retrieved.find(question)[:k], {"retriever": retrieved.where})


def from_own(examples: Iterable[RagExample], k: int) -> Iterator[RagExample]:
    """The ``k`` best of each example's own chunks by BM25, best first.

    Source: Block-Attention and KVLink re-rank a question's own paragraphs (with Contriever).
    """
    for example in examples:
        order = rank(example.question, example.chunks)[:k]
        supporting = tuple(place for place, i in enumerate(order) if i in example.supporting)
        chunks = tuple(example.chunks[i] for i in order)
        yield replace(example, chunks=chunks, supporting=supporting)


def _example(question: Question, chunks: tuple[Chunk, ...], meta: dict[str, Any]) -> RagExample:
    if question.data_sets:
        meta = meta | {DATA_SETS: dict(question.data_sets)}
    return RagExample(
        question.question, chunks, question.answers, None, question.kind, question.id, (), meta
    )


def _retrieved(record: Any) -> tuple[str, str, tuple[Chunk, ...]]:
    if not isinstance(record, Mapping):
        raise ValueError("must be an object")
    name = "passages" if "passages" in record else "ctxs"
    passages = record.get(name)
    if not isinstance(passages, list) or not passages:
        raise field_error("passages", 'a non-empty list of strings or {"text", "title"?}', passages)
    key, question = record.get("id"), record.get("question")
    if not key and not isinstance(question, str):
        raise ValueError('needs the question\'s "id" or the "question"')
    kept = [_only_text(passage) for passage in passages]
    chunks = tuple(parse_chunk(p, f"{name}[{i}]") for i, p in enumerate(kept))
    return str(key or ""), (question or "").strip(), chunks


def _only_text(passage: Any) -> Any:
    """Retrievers write scores and ids beside the text."""
    if isinstance(passage, Mapping):
        return {key: passage[key] for key in ("title", "text") if key in passage}
    return passage
