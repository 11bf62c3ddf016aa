"""Retrieval: adds passages to questions by BM25, embeddings or a retriever's file; re-ranking."""

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
from blocktune.data.sources.records import parse_record, read_records
from blocktune.data.sources.schemas import PASSAGES, answers_of, id_of
from blocktune.prompt.format import Chunk

Embed = Callable[[Sequence[str]], Any]
"""Embeds ``N`` texts as unit vectors, ``(N, D)``."""


class Hit(NamedTuple):
    """Index of a chunk in the corpus, and its score."""

    index: int
    score: float


class Index:
    """A search index over the titles and texts of chunks, at least one.

    Scores are Lucene's BM25 without English stop words, by bm25s (arXiv:2407.03618), or cosine
    similarities if ``embed`` is given.
    """

    def __init__(self, chunks: Sequence[Chunk], embed: Embed | None = None):
        if not chunks:
            raise ValueError("an index needs at least one chunk, got none")
        self.chunks = list(chunks)
        texts = [f"{chunk.title or ''} {chunk.text}".strip() for chunk in chunks]
        self._scores = _bm25(texts) if embed is None else _cosine(texts, embed)

    def search(self, questions: Sequence[str], k: int) -> list[list[Hit]]:
        """Finds the ``k`` best chunks for each question. Ties are in the order of the corpus."""
        best, k = [], min(k, len(self.chunks))
        for scores in self._scores(list(questions)):
            # Candidates are all chunks that reach the k-th score, so that ties are stable.
            (candidates,) = np.nonzero(scores >= -np.partition(-scores, k - 1)[k - 1])
            order = candidates[np.argsort(-scores[candidates], kind="stable")][:k]
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
    """A question without passages, with the fields of `RagExample` that do not depend on them."""

    question: str
    answers: tuple[str, ...]
    id: str = ""
    kind: str = ""
    data_sets: Mapping[str, str] = MappingProxyType({})  # names on the Hub to licences
    response: str | None = None
    followups: tuple[tuple[str, str], ...] = ()
    meta: Mapping[str, Any] = MappingProxyType({})


def read_questions(
    source: str | Path, *, limit: int | None = None, split: str | None = None
) -> Iterator[Question]:
    """Reads questions from a file, or from a Hub data set by its short name or ``hf:NAME``."""
    parsed = parse_source(str(source))
    exists = parsed.name in CATALOG or parsed.name.startswith("hf:") or Path(parsed.name).is_file()
    if not exists:
        raise ValueError(f"no file '{source}'; give a file, 'hf:NAME', or a name: triviaqa, nq")
    records = open_records(parsed, read_options(parsed, split=split), limit)
    sets = data_sets_in(parsed.text)
    questions = (parse_record(record, _question) for record in records)
    credited = (q._replace(data_sets={**q.data_sets, **sets}) for q in questions)
    return islice(credited, limit)


def _question(record: Mapping[str, Any]) -> Question:
    text = record.get("question")
    if not isinstance(text, str) or not text.strip():
        raise field_error("question", "a non-blank string", text)
    kind = record.get("kind") or record.get("type") or ""
    kind = kind if isinstance(kind, str) else ""
    meta = record.get("meta")
    meta = dict(meta) if isinstance(meta, Mapping) else {}
    sets = meta.pop(DATA_SETS, None)
    sets = sets if isinstance(sets, Mapping) else {}
    answers = answers_of(record)
    if not all(answer.strip() for answer in answers):
        raise field_error("answers", "text that is not blank", answers)
    response, more = record.get("response"), record.get("followups") or ()
    more = tuple(tuple(turn) if isinstance(turn, list) else turn for turn in more)
    own = Question(text.strip(), answers, id_of(record), kind, sets, response, more, meta)
    _example(own, (Chunk("any"),), {})  # raises ValueError for a field of another type
    return own


def from_corpus(
    questions: Iterable[Question],
    corpus: Sequence[Chunk],
    k: int,
    embed: Embed | None = None,
) -> list[RagExample]:
    """Gives each question the ``k`` best passages of a corpus, with their scores in ``meta``."""
    index = Index(corpus, embed)
    questions = list(questions)
    results = index.search([question.question for question in questions], k)
    examples = []
    for question, hits in zip(questions, results, strict=True):
        scores = [round(hit.score, 4) for hit in hits]
        meta = {"retriever": "bm25" if embed is None else "dense", "scores": scores}
        chunks = tuple(index.chunks[hit.index] for hit in hits)
        examples.append(_example(question, chunks, meta))
    return examples


def from_retriever(questions: Iterable[Question], path: str | Path, k: int) -> Iterator[RagExample]:
    """Gives each question its first ``k`` passages of a retriever's output file.

    A record of the file has ``id``, ``question`` or both, and ``passages``, ``ctxs`` (DPR, FiD) or
    another of `PASSAGES`, best first, in any form that `RagExample` reads. Ids and scores of
    passages are kept as metadata. Raises ValueError, which names file, line and field.
    """
    retrieved: dict[tuple[str, str], tuple[Chunk, ...]] = {}
    for record in read_records(path):
        key, text, chunks = parse_record(record, _retrieved)
        retrieved |= {name: chunks for name in (("id", key), ("question", text)) if name[1]}
    for question in questions:
        by_id = retrieved.get(("id", question.id)) if question.id else None
        if not (chunks := by_id or retrieved.get(("question", question.question))):
            name = question.id or question.question
            raise ValueError(f"{Path(path).name} has no passages for question '{name:.60}'")
        yield _example(question, chunks[:k], {"retriever": Path(path).name})


def from_own(examples: Iterable[RagExample], k: int) -> Iterator[RagExample]:
    """Keeps the ``k`` best chunks of each example by BM25, best first.

    Source: Block-Attention and KVLink re-rank each question's paragraphs (with Contriever).
    """
    for example in examples:
        (hits,) = Index(example.chunks).search([example.question], k)
        order = [hit.index for hit in hits]
        supporting = tuple(place for place, i in enumerate(order) if i in example.supporting)
        chunks = tuple(example.chunks[i] for i in order)
        yield replace(example, chunks=chunks, supporting=supporting)


def _example(question: Question, chunks: tuple[Chunk, ...], meta: dict[str, Any]) -> RagExample:
    meta = dict(question.meta) | meta
    if question.data_sets:
        meta |= {DATA_SETS: dict(question.data_sets)}
    return RagExample(
        question.question,
        chunks,
        question.answers,
        response=question.response,
        kind=question.kind,
        id=question.id,
        meta=meta,
        followups=question.followups,
    )


def _retrieved(record: Any) -> tuple[str, str, tuple[Chunk, ...]]:
    """Id, question and passages of a record of a retriever's file."""
    name = next((name for name in ("passages", *PASSAGES) if name in record), "passages")
    key, question = record.get("id"), record.get("question")
    if not key and not isinstance(question, str):
        raise ValueError('needs the question\'s "id" or the "question"')
    return str(key or ""), (question or "").strip(), read_chunks(record.get(name), name)
