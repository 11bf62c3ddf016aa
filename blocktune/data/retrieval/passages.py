"""Examples out of questions and passages: from a corpus, a retriever's file, or their own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from blocktune.data.attribution import DATA_SETS
from blocktune.data.example import RagExample, field_error, parse_chunk
from blocktune.data.retrieval.bm25 import Bm25, rank
from blocktune.data.sources.catalog import CATALOG, data_sets_in
from blocktune.data.sources.load import open_records
from blocktune.data.sources.options import parse_source, read_options
from blocktune.data.sources.parsing import at
from blocktune.data.sources.records import read_records
from blocktune.data.sources.schemas import not_blank
from blocktune.data.sources.texts import trivia_answers
from blocktune.prompt.format import Chunk


class Question(NamedTuple):
    """A question and its accepted answers, and the data sets it is from, see `data.credit`."""

    question: str
    answers: tuple[str, ...]
    id: str = ""
    kind: str = ""
    data_sets: Mapping[str, str] = MappingProxyType({})


def read_questions(
    source: str | Path, *, limit: int | None = None, split: str | None = None
) -> Iterator[Question]:
    """Reads the questions of a file or a Hub data set: NQ, TriviaQA, or any with contexts.

    Args:
        source: A path, a short name, or ``hf:NAME``.
        limit: Stop after so many.
        split: Of a Hub data set.

    Raises:
        ValueError: If the source is unknown or a record has no question; names file and line.
    """
    named = parse_source(str(source))
    known = named.name in CATALOG or named.name.startswith("hf:") or Path(named.name).is_file()
    if not known:
        raise ValueError(f"no file '{source}'; give a file, 'hf:NAME', or a name: triviaqa, nq")
    records = open_records(named, read_options(named, split=split), limit)
    sets = data_sets_in(named.text)
    questions = (at(record, _question) for record in records)
    credited = (q._replace(data_sets={**q.data_sets, **sets}) for q in questions)
    return islice(credited, limit)


def _question(record: Mapping[str, Any]) -> Question:
    if not isinstance(record, Mapping):
        raise ValueError("must be an object")
    text = record.get("question")
    if not isinstance(text, str) or not text.strip():
        raise field_error("question", "a non-blank string", text)
    own = next((str(record[key]) for key in ("id", "_id", "question_id") if record.get(key)), "")
    kind = record.get("kind") or record.get("type") or ""
    kind = kind if isinstance(kind, str) else ""
    return Question(text.strip(), _answers(record), own, kind, _data_sets(record))


def _data_sets(record: Mapping[str, Any]) -> Mapping[str, str]:
    meta = record.get("meta")
    named = meta.get(DATA_SETS) if isinstance(meta, Mapping) else None
    return named if isinstance(named, Mapping) else {}


def _answers(record: Mapping[str, Any]) -> tuple[str, ...]:
    """``answers``, or ``answer`` as text, a list, or TriviaQA's value with aliases."""
    answer = record.get("answers")
    answer = record.get("answer") if answer is None else answer
    if isinstance(answer, Mapping):
        return trivia_answers(record)
    several = [answer] if isinstance(answer, str) else answer
    if not isinstance(several, list) or not all(isinstance(a, str) for a in several):
        raise field_error("answer", "text, a list of texts, or an object with a value", answer)
    answers = not_blank([*several, *(record.get("answer_aliases") or ())])
    if not all(answer.strip() for answer in answers):
        raise field_error("answer", "text that is not blank", answer)
    return answers


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
