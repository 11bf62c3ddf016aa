"""Questions without regard to what context they came with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from blocktune.data.credit import DATA_SETS
from blocktune.data.example import field_error
from blocktune.data.sources.catalog import CATALOG, data_sets_in
from blocktune.data.sources.load import open_records
from blocktune.data.sources.options import parse_source
from blocktune.data.sources.parsing import at
from blocktune.data.sources.reading import read_options
from blocktune.data.sources.schemas import not_blank
from blocktune.data.sources.texts import trivia_answers


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
