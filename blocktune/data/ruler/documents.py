"""Questions over documents, the golden ones among others: SQuAD's and HotpotQA's files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from blocktune.data.ruler.problem import Problem
from blocktune.data.sources.records import read_json, read_records
from blocktune.data.sources.schemas import LeftOut, parse_wiki


@dataclass(frozen=True)
class Asked:
    """A question, its accepted answers, its documents, and more of the same article."""

    question: str
    answers: tuple[str, ...]
    documents: tuple[int, ...]
    more: tuple[int, ...] = ()
    gold: tuple[int, ...] = ()


@dataclass(frozen=True)
class Library:
    """All documents of a file, and the questions about them."""

    documents: tuple[str, ...]
    questions: tuple[Asked, ...]


def make_qa(library: Library, asked: Asked, rng: Random, size: int) -> Problem:
    """The question over ``size`` documents in random order, its own among them.

    RULER numbers the documents; here they carry no number, so that a chunk is the same wherever
    it stands. Where a file has too few for the length, RULER repeats them; here it is refused.

    Raises:
        ValueError: If the file has fewer documents.
    """
    own = list(asked.documents)
    if size > len(library.documents):
        raise ValueError(
            f"ruler: {size} or more documents are needed to fill the length, the file has "
            f"{len(library.documents)}; give a larger file or a smaller length"
        )
    chosen = own + _others(library, asked, rng, max(0, size - len(own)))
    rng.shuffle(chosen)
    gold = set(asked.gold)
    return Problem(
        units=[library.documents[index] for index in chosen],
        joiner=None,
        question=asked.question,
        answers=asked.answers,
        marks=frozenset(place for place, index in enumerate(chosen) if index in gold),
        lead="Answer:",
    )


def read_squad(path: str | Path) -> Library:
    """Reads a file in SQuAD's format, v1.1 or v2.0; questions without an answer are left out.

    Raises:
        ValueError: If it is not in that format; names the file and the field.
    """
    record = read_json(path)
    where = Path(path).name
    try:
        articles = [article["paragraphs"] for article in record["data"]]
        texts = dict.fromkeys(p["context"] for paragraphs in articles for p in paragraphs)
        index = {text: number for number, text in enumerate(texts)}
        questions = [
            _asked(entry, index[paragraph["context"]], [index[p["context"]] for p in paragraphs])
            for paragraphs in articles
            for paragraph in paragraphs
            for entry in paragraph["qas"]
            if not entry.get("is_impossible") and entry["answers"]
        ]
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{where} is not in SQuAD's format (data, paragraphs, context, qas, question, "
            f"answers): {type(error).__name__} {error}"
        ) from None
    return _library(where, tuple(texts), questions)


def read_hotpot(path: str | Path) -> Library:
    """Reads a file of HotpotQA's distractor setting, or 2WikiMultihopQA; each title with its text.

    Raises:
        ValueError: If a record is not of that shape; names file, record and field.
    """
    index: dict[str, int] = {}
    questions = []
    for record in read_records(path):
        try:
            example = parse_wiki(_mapping(record.value))
        except LeftOut:
            continue
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{record.where}: {error}") from None
        texts = [f"{c.title}\n{c.text}" if c.title else c.text for c in example.chunks]
        own = [index.setdefault(text, len(index)) for text in texts]
        gold = tuple(own[i] for i in example.supporting)
        questions.append(Asked(example.question, example.answers, tuple(own), gold=gold))
    return _library(Path(path).name, tuple(index), questions)


def _asked(entry: Mapping[str, Any], own: int, article: list[int]) -> Asked:
    answers = tuple(dict.fromkeys(answer["text"] for answer in entry["answers"]))
    more = tuple(dict.fromkeys(index for index in article if index != own))
    return Asked(entry["question"].strip(), answers, (own,), more, (own,))


def _others(library: Library, asked: Asked, rng: Random, count: int) -> list[int]:
    """First of the same article, as RULER, then of all."""
    if count <= len(asked.more):
        return rng.sample(asked.more, count)
    known = {*asked.documents, *asked.more}
    rest = [index for index in range(len(library.documents)) if index not in known]
    return [*asked.more, *rng.sample(rest, count - len(asked.more))]


def _library(where: str, documents: tuple[str, ...], questions: list[Asked]) -> Library:
    if not questions:
        raise ValueError(f"{where} holds no question with an answer")
    return Library(documents, tuple(questions))


def _mapping(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or "question" not in value:
        raise ValueError('must be an object with "question" and "context"')
    return value
