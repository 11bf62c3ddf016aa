"""A question over retrieved chunks: the record into which every source is converted."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import islice
from numbers import Real
from pathlib import Path
from typing import Any

from blocktune.files import replacing
from blocktune.prompt.format import Chunk, PromptFormat, require_unicode

TEXT_KEYS = ("text", "page_content", "contents", "content", "paragraph_text", "sentences")
TEXT_KEYS += ("passage", "passage_text", "body", "snippet", "page_snippet", "data", "segment")
"""Fields that may hold a passage's text, in order of preference (LangChain, Pyserini, Cohere)."""
_NESTED_KEYS = ("data", "document", "node", "payload", "_source", "entity", "properties")
_NESTED_KEYS += ("text_resource",)
"""Fields in which a search engine's hit holds the passage, next to its score and id."""
_PRINTED = re.compile(
    r"(?s)\[?Document\((id|metadata|page_content)=.*\)\]?|page_content=['\"].* metadata=.*\}"
)

NO_ANSWER = "No Answer Present."
"""What MS MARCO gives as the answer to a question that no passage answers."""
CHUNK_WANTED = 'a string or {"text", "title"?}'


@dataclass(frozen=True)
class RagExample:
    """A question, its context of retrieved chunks, and the accepted answers.

    ``chunks`` may be given as a string, or a list of strings, ``[title, text]`` pairs, objects with
    one of `TEXT_KEYS` or LangChain documents, or as columns (``{"title": [...], "text": [...]}``).
    They become a tuple of `Chunk`, their other keys its ``metadata``. One answer may be a string;
    numbers become strings. Raises ValueError, which names a field of the wrong type.
    """

    question: str  # never blank
    chunks: tuple[Chunk, ...]  # retrieved passages in prompt order, at least one
    answers: tuple[str, ...] = ()  # accepted, the preferred one first; empty if unknown
    response: str | None = None  # training target, if it differs from ``answers[0]``
    kind: str = ""  # category, reported separately, e.g. ``2-hop``
    id: str = ""  # identifier in the source
    supporting: tuple[int, ...] = ()  # indices of chunks that hold the evidence, for all turns
    meta: dict[str, Any] = field(default_factory=dict)  # other data; JSON-serialisable
    # further questions about the same chunks with their target responses, for training
    followups: tuple[tuple[str, str], ...] = ()
    # messages before the response as (role, text): optionally system, then user and assistant in
    # turn, user last; the same text as chunks and question, for a mixture's ``turns``
    conversation: tuple[tuple[str, str], ...] = ()

    def __post_init__(self):
        values = {"chunks": read_chunks(self.chunks), "id": as_id(self.id)}
        for name in ("answers", "supporting", "followups", "conversation"):
            values[name] = _as_tuple(getattr(self, name))
        answers = values["answers"]
        answers = answers if isinstance(answers, tuple) else (answers,)
        vars(self).update(values, answers=tuple(map(_as_text, answers)))
        indices = range(len(self.chunks))
        valid_indices = isinstance(self.supporting, tuple) and all(
            type(index) is int and index in indices for index in self.supporting
        )
        in_turn = self.conversation == () or is_conversation(self.conversation)
        for name, accepted, wanted in (
            ("question", _is_text(self.question), "a non-blank string"),
            ("answers", _is_texts(self.answers), "a list of non-blank strings"),
            ("response", self.response is None or _is_text(self.response), "a string or null"),
            ("kind", isinstance(self.kind, str), "a string"),
            ("id", isinstance(self.id, str), "a string"),
            ("supporting", valid_indices, f"a list of chunk indices from 0 to {indices[-1]}"),
            ("meta", isinstance(self.meta, dict), "an object"),
            ("followups", _is_turns(self.followups), "a list of [question, response]"),
            ("conversation", in_turn, "[role, text]: perhaps system, then user, assistant in turn"),
        ):
            value = getattr(self, name)
            if not accepted:
                raise field_error(name, wanted, value)
            for text in value if isinstance(value, tuple) else (value,):
                if isinstance(text, str):
                    require_unicode(text, f'field "{name}"')

    @property
    def target(self) -> str:
        """Training target: ``response`` if given, else the first answer."""
        if self.response is None and not self.answers:
            name = self.id or self.question
            raise ValueError(f"example '{name}' has no answer to train on; give it 'answers'")
        return self.answers[0] if self.response is None else self.response

    def to_json(self) -> dict[str, Any]:
        """Converts to plain JSON types. Empty fields are left out."""
        record = {"id": self.id, "kind": self.kind, "question": self.question}
        chunks = (
            {"title": c.title, "text": c.text, "metadata": {**c.metadata}} for c in self.chunks
        )
        record["chunks"] = [{k: v for k, v in chunk.items() if v} for chunk in chunks]
        record |= {"answers": list(self.answers), "response": self.response}
        record |= {"supporting": list(self.supporting), "meta": self.meta}
        for name in ("followups", "conversation"):
            record[name] = [list(turn) for turn in getattr(self, name)]
        return {key: value for key, value in record.items() if value not in ("", None, [], {})}

    @classmethod
    def from_json(cls, record: Any, where: str = "") -> RagExample:
        """Converts a decoded record: a line of a file, or a row of a Hugging Face data set.

        ``answer`` is read as ``answers``. Null fields are ignored, unknown ones kept in ``meta``.
        ValueError, starting with ``where``, if a field is wrong, missing or misspelt.
        """
        try:
            return cls(**_decode(record))
        except ValueError as error:
            raise ValueError(f"{where}: {error}" if where else str(error)) from None


FIELDS = tuple(f.name for f in fields(RagExample))


def own_wording(example: RagExample, fmt: PromptFormat) -> PromptFormat | None:
    """The run's format with the system turn in the example's ``meta``; None if it has none."""
    system = example.meta.get("system")
    return replace(fmt, system=system) if isinstance(system, str) else None


def unknown_fields(record: Mapping[str, Any]) -> list[str]:
    """Fields of a record that `RagExample.from_json` keeps in ``meta``."""
    known = {*FIELDS, "answer"} if _is_null(record.get("answers")) else {*FIELDS}
    return [key for key, value in record.items() if key not in known and not _is_null(value)]


def write_jsonl(path: str | Path, examples: Iterable[RagExample]) -> int:
    """Writes one example per line, atomically. Returns the number of examples."""
    count = 0
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as out:
        for example in examples:
            count += 1
            out.write(json.dumps(plain(example.to_json()), ensure_ascii=False, default=str) + "\n")
    return count


def brief(value: Any) -> str:
    """Formats a value as JSON of at most 60 characters, for error messages."""
    text = json.dumps(value, ensure_ascii=False, default=repr)
    text = text.encode(errors="backslashreplace").decode()
    return text if len(text) <= 60 else text[:57] + "..."


def field_error(name: str, wanted: str, got: Any) -> ValueError:
    """The error for a field with a wrong value, the same for all readers."""
    return ValueError(f'field "{name}" must be {wanted}, got {brief(got)}')


def near_miss(keys: Iterable[str], missing: Sequence[str]) -> tuple[str, str] | None:
    """Finds the first key that looks like a misspelling of a missing field; returns both."""
    for key in islice((key for key in keys if len(str(key)) > 3), 100):  # each takes a while
        near = [name for name in missing if abs(len(str(key)) - len(name)) <= 1]
        if matches := difflib.get_close_matches(str(key).lower(), near, n=1, cutoff=0.8):
            return key, matches[0]
    return None


def read_chunks(value: Any, name: str = "chunks") -> tuple[Chunk, ...]:
    """Converts a question's passages, at least one, from any form that `RagExample.chunks` has."""
    entries = passages_in(value, name)
    if not entries:
        raise field_error(name, f"a non-empty list, each {CHUNK_WANTED}", value)
    return tuple(read_chunk(entry, f"{name}[{i}]") for i, entry in enumerate(entries))


def passages_in(value: Any, name: str) -> list[Any]:
    """Splits a value into passages, each in a form that `chunk_fields` reads."""
    if isinstance(value, str | Chunk) or hasattr(value, "page_content"):
        return [value]
    if isinstance(value, Mapping):
        if not value or not all(isinstance(column, list) for column in value.values()):
            return [value]
        if len({len(column) for column in value.values()}) != 1:
            raise field_error(name, 'an object of lists "title", "text" of one length', value)
        return [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
    if type(value).__name__ == "DataFrame":  # iterates over the names of its columns
        return value.to_dict("records")
    if not isinstance(value, Iterable) or isinstance(value, bytes | set | frozenset):
        raise field_error(name, f"a non-empty list, each {CHUNK_WANTED}", value)
    return list(value)


def read_chunk(value: Any, name: str) -> Chunk:
    """Converts a passage of any form of `RagExample.chunks`. Errors name the field ``name``."""
    if isinstance(value, Chunk):
        return value
    fields = chunk_fields(value, name)
    try:
        return Chunk(**fields)
    except ValueError as error:
        raise ValueError(f'field "{name}": {error}') from None


def chunk_fields(value: Any, name: str) -> dict[str, Any]:
    """Extracts text, title and metadata of a passage, without validating them."""
    if isinstance(value, str):
        if _PRINTED.fullmatch(value):
            raise field_error(name, "a document's text, not a printed document", value)
        return {"text": value}
    is_pair = isinstance(value, list | tuple) and len(value) == 2
    if is_pair and isinstance(value[1], Real):  # LangChain's (document, score)
        passage = chunk_fields(value[0], name)
        return {**passage, "metadata": {**passage.get("metadata", {}), "score": plain(value[1])}}
    if is_pair and isinstance(value[0], str | None):
        value = {"title": value[0], "text": value[1]}
    elif isinstance(value, Mapping) and isinstance(value.get("kwargs"), Mapping):
        value = value["kwargs"]  # LangChain's Document as its `dumps` writes it
    elif not isinstance(value, Mapping):  # a document of LangChain, LlamaIndex or Haystack
        names = (*TEXT_KEYS, *_NESTED_KEYS, "title", "metadata", "meta", "id", "score")
        found = {key: getattr(value, key, None) for key in names}
        found = {k: v for k, v in found.items() if isinstance(v, str | Mapping | Real)}
        value = found or value
    if not isinstance(value, Mapping):
        raise field_error(name, CHUNK_WANTED, value)
    value = {key: None if _is_null(given) else given for key, given in value.items()}
    for key in _NESTED_KEYS:
        if isinstance(value.get(key), Mapping):
            value = {**value, key: None, **value[key]}
    key = next((key for key in TEXT_KEYS if value.get(key) is not None), None)
    missing = ["text"] * (key is None) + ["title"] * ("title" not in value)
    misspelt = near_miss((k for k in value if k not in TEXT_KEYS), missing)
    if key is None or misspelt:
        hint = f'; did you mean "{misspelt[1]}" by "{misspelt[0]}"?' if misspelt else ""
        raise ValueError(f"{field_error(name, CHUNK_WANTED, value)}{hint}")
    text = value[key]
    if isinstance(text, list) and all(isinstance(sentence, str) for sentence in text):
        text = " ".join(sentence.strip() for sentence in text)
    metadata = {k: v for k, v in value.items() if k not in (key, "title") and v is not None}
    if isinstance(metadata.get("metadata"), Mapping):
        metadata = {**_filled(metadata.pop("metadata")), **metadata}
    return {"text": text, "title": _as_text(value.get("title")), "metadata": metadata}


def read_answers(value: Any, name: str = "answers") -> tuple[str, ...]:
    """Distinct answers of text, a list, SQuAD's ``{"text"}`` or TriviaQA's ``{"value"}``.

    Blank ones, which public data sets contain, are dropped unless all are blank.
    """
    answers = given = [] if value is None else _as_text(value)
    if isinstance(given, Mapping) and "value" in given:
        answers = [given["value"], *read_answers(given.get("aliases"), "aliases")]
    elif isinstance(given, Mapping):
        answers = given.get("text")
    answers = [answers] if isinstance(answers, str) else answers
    entries = answers if isinstance(answers, list | tuple) else [None]
    texts = [a.get("text") if isinstance(a, Mapping) else _as_text(a) for a in entries]
    if not all(isinstance(text, str) for text in texts):
        wanted = 'text, a list of texts, {"text"} or {"value", "aliases"}'
        raise field_error(name, wanted, given)
    distinct = tuple(dict.fromkeys(texts))
    return tuple(text for text in distinct if text.strip()) or distinct


def answers_of(record: Mapping[str, Any]) -> tuple[str, ...]:
    """Answers and aliases of a record; empty for a test set that is released without answers.

    In records of RAGAS, ``answer`` is what a system answered, beside the right ``ground_truth``.
    """
    names = ("answers", "golden_answers", "ground_truth", "ground_truths", "answer")
    name = next((name for name in names if record.get(name) is not None), None)
    if name is None:
        return ()
    aliases = read_answers(record.get("answer_aliases"), "answer_aliases")
    answers = read_answers([*read_answers(record[name], name), *aliases])
    return () if answers == (NO_ANSWER,) else answers


def is_conversation(value: Any) -> bool:
    """Whether messages alternate as chat templates require; see `RagExample.conversation`."""
    if not _is_turns(value):
        return False
    roles = [role for role, _ in value]
    roles = roles[1:] if roles[:1] == ["system"] else roles
    return len(roles) % 2 == 1 and roles == (["user", "assistant"] * len(roles))[: len(roles)]


def _decode(record: Any) -> dict[str, Any]:
    if not isinstance(record, Mapping):
        raise ValueError(f"must be an object, got {brief(record)}")
    given = _filled(record)
    unknown = unknown_fields(record)
    if match := near_miss(unknown, [name for name in FIELDS if name not in given]):
        known = ", ".join(FIELDS)
        raise ValueError(f'unknown field "{match[0]}"; did you mean "{match[1]}"? known: {known}')
    if missing := [key for key in ("question", "chunks") if key not in given]:
        raise ValueError(f'field "{missing[0]}" is missing; known: {", ".join(FIELDS)}')
    values = {key: given[key] for key in FIELDS if key in given}
    values["answers"] = answers_of(given)
    if isinstance(meta := values.get("meta", {}), dict):
        if repeated := sorted(_filled(meta).keys() & unknown):
            raise ValueError(f'field "{repeated[0]}" is given twice, in the record and in "meta"')
        values["meta"] = _filled(meta) | {key: given[key] for key in unknown}
    return values


def _filled(record: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that are not null: tables give every row the fields of all others, as null."""
    return {key: value for key, value in record.items() if not _is_null(value)}


def _is_null(value: Any) -> bool:
    """Whether a field is missing: null, or NaN, which pandas writes instead."""
    return value is None or (isinstance(value, float) and value != value)


def as_id(value: Any) -> Any:
    """An identifier as text, or "" if it is missing."""
    return "" if _is_null(value) else _as_text(value)


def plain(value: Any) -> Any:
    """Converts NumPy arrays and numbers, at any depth, to Python's; pandas returns such rows."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, Mapping):
        return {key: plain(entry) for key, entry in value.items()}
    return list(map(plain, value)) if isinstance(value, list) else value


def _as_text(value: Any) -> Any:
    """A number as text; 7.0 is 7, as tables write whole numbers if some are missing."""
    value = plain(value)
    value = int(value) if isinstance(value, float) and value.is_integer() else value
    return str(value) if type(value) in (int, float) and not _is_null(value) else value


def _as_tuple(value: Any) -> Any:
    """Lists as tuples, at any depth."""
    value = plain(value)
    return tuple(map(_as_tuple, value)) if isinstance(value, list | tuple) else value


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_texts(value: Any) -> bool:
    return isinstance(value, tuple) and all(map(_is_text, value))


def _is_turns(value: Any) -> bool:
    return isinstance(value, tuple) and all(_is_texts(turn) and len(turn) == 2 for turn in value)
