"""Passages for questions that have none, by BM25 or a retriever's file, and the best of many."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from blocktune.data.example import RagExample, field_error, read_chunks
from blocktune.data.sources.catalog import CATALOG, DATA_SETS, data_sets_in
from blocktune.data.sources.load import open_records
from blocktune.data.sources.options import parse_source, read_options
from blocktune.data.sources.records import at, read_records
from blocktune.data.sources.schemas import PASSAGES, answers_of, id_of
from blocktune.prompt.format import Chunk

Embed = Callable[[Sequence[str]], Any]
"""Texts to vectors."""


class Hit(NamedTuple):
    """A chunk's number in the corpus, and its score."""

    index: int
    score: float


class Index:
    """An index over at least one chunk, titles included.

    By Lucene's BM25, as bm25s has it (arXiv:2407.03618), without English stop words; or by cosine
    similarity, where ``embed`` gives texts vectors of length 1, ``(N, D)``.
    """

    def __init__(self, chunks: Sequence[Chunk], embed: Embed | None = None):
        if not chunks:
            raise ValueError("an index needs at least one chunk, got none")
        self.chunks = list(chunks)
        texts = [f"{chunk.title or ''} {chunk.text}".strip() for chunk in chunks]
        self._scores = _bm25(texts) if embed is None else _cosine(texts, embed)

    def search(self, questions: Sequence[str], k: int) -> list[list[Hit]]:
        """The ``k`` best chunks of each question; equal scores keep the order of the corpus."""
        best, k = [], min(k, len(self.chunks))
        for scores in self._scores(list(questions)):
            # All that reach the k-th score: equal ones keep the order of the corpus.
            (near,) = np.nonzero(scores >= -np.partition(-scores, k - 1)[k - 1])
            order = near[np.argsort(-scores[near], kind="stable")][:k]
            best.append([Hit(int(index), float(scores[index])) for index in order])
        return best


def _bm25(texts: list[str]) -> Callable[[list[str]], Iterator[np.ndarray]]:
    import bm25s

    tokens = partial(bm25s.tokenize, stopwords="en", show_progress=False, allow_empty=True)
    index = bm25s.BM25()
    index.index(tokens(texts), show_progress=False)

    def scores(questions: list[str]) -> Iterator[np.ndarray]:
        for words in tokens(questions, return_ids=False):
            yield index.get_scores(words) if words else np.zeros(len(texts))

    return scores


def _cosine(texts: list[str], embed: Embed) -> Callable[[list[str]], np.ndarray]:
    vectors = np.asarray(embed(texts))
    return lambda questions: np.asarray(embed(questions)) @ vectors.T


class Question(NamedTuple):
    """A question, its accepted answers, and the data sets it is from (`data.attribution`)."""

    question: str
    answers: tuple[str, ...]
    id: str = ""
    kind: str = ""
    data_sets: Mapping[str, str] = MappingProxyType({})


def read_questions(
    source: str | Path, *, limit: int | None = None, split: str | None = None
) -> Iterator[Question]:
    """Reads the questions of a file, or of a Hub data set by a short name or ``hf:NAME``."""
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
    text = record.get("question")
    if not isinstance(text, str) or not text.strip():
        raise field_error("question", "a non-blank string", text)
    kind = record.get("kind") or record.get("type") or ""
    kind = kind if isinstance(kind, str) else ""
    meta = record.get("meta")
    named = meta.get(DATA_SETS) if isinstance(meta, Mapping) else None
    named = named if isinstance(named, Mapping) else {}
    answers = answers_of(record)
    if not all(answer.strip() for answer in answers):
        raise field_error("answers", "text that is not blank", answers)
    return Question(text.strip(), answers, id_of(record), kind, named)


def from_corpus(
    questions: Iterable[Question],
    corpus: Sequence[Chunk],
    k: int,
    embed: Embed | None = None,
) -> list[RagExample]:
    """The ``k`` best passages of a corpus, best first; ``meta`` holds their scores."""
    index = Index(corpus, embed)
    questions = list(questions)
    found = index.search([question.question for question in questions], k)
    examples = []
    for question, hits in zip(questions, found, strict=True):
        scores = [round(hit.score, 4) for hit in hits]
        meta = {"retriever": "bm25" if embed is None else "dense", "scores": scores}
        chunks = tuple(index.chunks[hit.index] for hit in hits)
        examples.append(_example(question, chunks, meta))
    return examples


def from_retriever(questions: Iterable[Question], path: str | Path, k: int) -> Iterator[RagExample]:
    """The first ``k`` passages that a retriever's file has for each question.

    A record has ``id`` or ``question`` (or both) and ``passages``, ``ctxs`` (DPR, FiD) or another
    of `PASSAGES`, best first, in any form that `RagExample` reads; a passage's id and score stay
    with it. Else a ValueError names file, line and field.
    """
    found: dict[tuple[str, str], tuple[Chunk, ...]] = {}
    for record in read_records(path):
        key, asked, chunks = at(record, _retrieved)
        found |= {name: chunks for name in (("id", key), ("question", asked)) if name[1]}
    for question in questions:
        by_id = found.get(("id", question.id)) if question.id else None
        if not (chunks := by_id or found.get(("question", question.question))):
            name = question.id or question.question
            raise ValueError(f"{Path(path).name} has no passages for question '{name:.60}'")
        yield _example(question, chunks[:k], {"retriever": Path(path).name})


def from_own(examples: Iterable[RagExample], k: int) -> Iterator[RagExample]:
    """The ``k`` best of each example's own chunks by BM25, best first.

    Source: Block-Attention and KVLink re-rank a question's own paragraphs (with Contriever).
    """
    for example in examples:
        (hits,) = Index(example.chunks).search([example.question], k)
        order = [hit.index for hit in hits]
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
    name = next((name for name in ("passages", *PASSAGES) if name in record), "passages")
    key, question = record.get("id"), record.get("question")
    if not key and not isinstance(question, str):
        raise ValueError('needs the question\'s "id" or the "question"')
    return str(key or ""), (question or "").strip(), read_chunks(record.get(name), name)
