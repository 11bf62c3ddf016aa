"""Retrieval: adds passages to questions by BM25, embeddings or a retriever's file; re-ranking."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any
from unicodedata import normalize

import numpy as np

from blocktune.data.answers import LATER, MARKS, UNSPACED
from blocktune.data.example import RagExample, answers_of, read_chunks
from blocktune.data.sources.catalog import with_data_sets
from blocktune.data.sources.load import on_the_hub, open_records
from blocktune.data.sources.options import parse_source, read_options
from blocktune.data.sources.records import parse_record, read_records
from blocktune.data.sources.schemas import PASSAGES, id_of
from blocktune.prompt.format import Chunk

Embed = Callable[[Sequence[str]], Any]  # embeds ``N`` texts as unit vectors, ``(N, D)``


class Index:
    """A search index over the titles and texts of chunks, at least one.

    Scores are cosine similarities if ``embed`` is given, else Lucene's BM25 (bm25s,
    arXiv:2407.03618) without English stop words; a Chinese or Japanese character is a word.
    """

    def __init__(self, chunks: Sequence[Chunk], embed: Embed | None = None):
        if not chunks:
            raise ValueError("an index needs at least one chunk, got none")
        self.chunks = list(chunks)
        texts = [_composed(f"{chunk.title or ''} {chunk.text}") for chunk in chunks]
        if embed is None:
            self._scores = _bm25(texts)
        else:
            vectors = np.asarray(embed(texts))
            self._scores = lambda asked: (vectors @ one for one in np.asarray(embed(asked)))

    def search(self, questions: Sequence[str], k: int) -> list[dict[int, float]]:
        """The ``k`` best chunks (index: score) of each question; ties in corpus order."""
        best, k = [], min(k, len(self.chunks))
        for scores in self._scores(list(map(_composed, questions))):
            # Candidates are all chunks that reach the k-th score, so that ties are stable.
            (candidates,) = np.nonzero(scores >= -np.partition(-scores, k - 1)[k - 1])
            order = candidates[np.argsort(-scores[candidates], kind="stable")][:k]
            best.append(dict(zip(order.tolist(), scores[order].tolist(), strict=True)))
        return best


def _composed(text: str) -> str:
    """A text to compare with others: accents are composed (NFC), so that either form matches."""
    return normalize("NFC", text).strip()


def _bm25(texts: list[str]) -> Callable[[list[str]], Iterator[np.ndarray]]:
    import bm25s

    letter = rf"[^\W{UNSPACED}]"
    words = rf"[{UNSPACED}]|(?:{letter}{{2,}}|{letter}(?=[{MARKS}])){LATER}"
    options = {"token_pattern": words, "stopwords": "en", "show_progress": False}
    tokens = partial(bm25s.tokenize, allow_empty=True, **options)
    corpus, index = tokens(texts), bm25s.BM25()
    has_words = any(corpus.ids)  # bm25s cannot index only stop words and single letters
    if has_words:
        index.index(corpus, show_progress=False)

    def scores(questions: list[str]) -> Iterator[np.ndarray]:
        for asked in tokens(questions, return_ids=False):
            yield index.get_scores(asked) if asked and has_words else np.zeros(len(texts))

    return scores


def read_questions(
    source: str | Path, *, limit: int | None = None, split: str | None = None
) -> Iterator[RagExample]:
    """Reads questions from a file, or from a Hub data set by its short name or ``hf:NAME``.

    Their only chunk is a placeholder, which `from_corpus` and `from_retriever` replace.
    """
    parsed = parse_source(str(source))
    if not on_the_hub(parsed) and not os.path.isfile(parsed.name):
        raise ValueError(f"no file '{source}'; give a file, 'hf:NAME', or a name: triviaqa, nq")
    records = open_records(parsed, read_options(parsed, split=split), limit)
    questions = (parse_record(record, _question) for record in records)
    return islice(with_data_sets(questions, parsed.text), limit)


def _question(record: Mapping[str, Any]) -> RagExample:
    kind = record.get("kind") or record.get("type") or ""
    question, meta = record.get("question"), record.get("meta")
    return RagExample(
        question.strip() if isinstance(question, str) else question,
        (Chunk("(no passages)"),),
        answers_of(record),
        response=record.get("response"),
        kind=kind if isinstance(kind, str) else "",
        id=id_of(record),
        meta=dict(meta) if isinstance(meta, Mapping) else {},
        followups=record.get("followups") or (),
    )


def from_corpus(
    questions: Iterable[RagExample], corpus: Sequence[Chunk], k: int, embed: Embed | None = None
) -> list[RagExample]:
    """Gives each question the ``k`` best passages of a corpus, with their scores in ``meta``."""
    questions = list(questions)  # a mistake in them is reported before the corpus is indexed
    index = Index(list(dict.fromkeys(corpus)), embed)
    results = index.search([question.question for question in questions], k)
    examples, retriever = [], {"retriever": "bm25" if embed is None else "dense"}
    for question, hits in zip(questions, results, strict=True):
        meta = question.meta | retriever | {"scores": [round(s, 4) for s in hits.values()]}
        chunks = tuple(index.chunks[place] for place in hits)
        examples.append(replace(question, chunks=chunks, meta=meta))
    return examples


def from_retriever(
    questions: Iterable[RagExample], path: str | Path, k: int
) -> Iterator[RagExample]:
    """Gives each question its first ``k`` passages of a retriever's output file.

    A record has ``id``, ``question`` or both, and ``passages`` or another of `PASSAGES`, best
    first, as `RagExample` reads them. Raises ValueError, which names file, line and field.
    """
    retrieved: dict[tuple[str, str], tuple[Chunk, ...]] = {}
    for record in read_records(path):
        key, text, chunks = parse_record(record, _retrieved)
        names = [name for name in (("id", key), ("question", text)) if name[1]]
        if retrieved.get(names[0], chunks) != chunks:
            raise ValueError(
                f"{record.where}: question '{names[0][1]:.60}' has other passages in another record"
            )
        for name in names:  # of a question under several ids, only the id tells which are meant
            retrieved[name] = chunks if retrieved.get(name, chunks) == chunks else ()
    for question in questions:
        by_id = retrieved.get(("id", question.id)) if question.id else None
        by_text = retrieved.get(("question", _composed(question.question)))
        if not (chunks := by_id or by_text):
            name = f"'{question.id or question.question:.60}'"
            has = "has no passages" if by_text is None else "has other passages under each id"
            raise ValueError(f"{Path(path).name} {has} for question {name}")
        meta = question.meta | {"retriever": Path(path).name}
        yield replace(question, chunks=chunks[:k], meta=meta)


def from_own(examples: Iterable[RagExample], k: int) -> Iterator[RagExample]:
    """Keeps the ``k`` best chunks of each example by BM25 (the papers: Contriever), best first."""
    for example in examples:
        (hits,) = Index(example.chunks).search([example.question], k)
        supporting = tuple(place for place, i in enumerate(hits) if i in example.supporting)
        chunks = tuple(example.chunks[i] for i in hits)
        yield replace(example, chunks=chunks, supporting=supporting)


def _retrieved(record: Any) -> tuple[str, str, tuple[Chunk, ...]]:
    name = next((n for n in ("passages", *PASSAGES) if record.get(n) is not None), "passages")
    key, question = id_of(record), record.get("question")
    question = _composed(question) if isinstance(question, str) else ""
    if not key and not question:
        raise ValueError('needs the question\'s "id" or the "question"')
    return key, question, read_chunks(record.get(name), name)
