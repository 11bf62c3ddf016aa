"""One question over retrieved chunks: the record that every source turns into."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from blocktune.prompt.format import Chunk

CHUNKS_WANTED = 'a non-empty list of strings or {"text", "title"?}'


@dataclass(frozen=True)
class RagExample:
    """A question, the chunks it is asked over, and what counts as an answer.

    Attributes:
        question: The question, never blank.
        chunks: Retrieved passages in prompt order, at least one.
        answers: Accepted answers, the preferred one first; empty when they are unknown.
        response: What a model should write when it differs from ``answers[0]``
            (``'Anna Belt. Answer: Port Alder'``), or None.
        kind: Reported separately, e.g. ``'2-hop'`` or ``'comparison'``.
        id: The source's identifier.
        supporting: Indices of the chunks that hold the evidence, of all turns.
        meta: Whatever else the source knows; must survive JSON.
        followups: Further questions about the same chunks, each with what a model should write;
            training takes them as turns after the first. Serving asks ``question`` alone.
        conversation: Where the source is one: the messages up to the response as (role, text),
            perhaps the system's, then the user's and the assistant's in turn, the user's last. The
            same is in ``chunks`` and ``question``; a mixture's ``turns`` trains on it as it was.

    Raises:
        ValueError: If a field is not of its type, in one line that names the field.
    """

    question: str
    chunks: tuple[Chunk, ...]
    answers: tuple[str, ...] = ()
    response: str | None = None
    kind: str = ""
    id: str = ""
    supporting: tuple[int, ...] = ()
    meta: dict[str, Any] = field(default_factory=dict)
    followups: tuple[tuple[str, str], ...] = ()
    conversation: tuple[tuple[str, str], ...] = ()

    def __post_init__(self):
        _check_field(self, "question", _is_text, "a non-blank string")
        _check_field(self, "chunks", _is_chunks, "a non-empty tuple of Chunk")
        _check_field(self, "answers", _is_texts, "a list of non-blank strings")
        _check_field(self, "response", lambda v: v is None or _is_text(v), "a string or null")
        _check_field(self, "kind", lambda v: isinstance(v, str), "a string")
        _check_field(self, "id", lambda v: isinstance(v, str), "a string")
        wanted = f"a list of chunk indices from 0 to {len(self.chunks) - 1}"
        _check_field(self, "supporting", lambda v: _is_indices(v, len(self.chunks)), wanted)
        _check_field(self, "meta", lambda v: isinstance(v, dict), "an object")
        _check_field(self, "followups", _is_turns, "a list of [question, response]")
        wanted = "[role, text] of system, user, assistant in turn, the user's last"
        _check_field(self, "conversation", lambda v: v == () or is_conversation(v), wanted)

    @property
    def target(self) -> str:
        """What training asks the model to write: ``response``, else the first answer.

        Raises:
            ValueError: If the example has neither.
        """
        if self.response is None and not self.answers:
            name = self.id or self.question
            raise ValueError(f"example '{name}' has no answer to train on; give it 'answers'")
        return self.answers[0] if self.response is None else self.response

    def to_json(self) -> dict[str, Any]:
        """Returns plain JSON types; fields that hold their default are left out."""
        chunks = [
            {"title": c.title, "text": c.text} if c.title else {"text": c.text} for c in self.chunks
        ]
        record = {"id": self.id, "kind": self.kind, "question": self.question, "chunks": chunks}
        record |= {"answers": list(self.answers), "response": self.response}
        record |= {"supporting": list(self.supporting), "meta": self.meta}
        for name in ("followups", "conversation"):
            record[name] = [list(turn) for turn in getattr(self, name)]
        return {key: value for key, value in record.items() if value not in ("", None, [], {})}

    @classmethod
    def from_json(cls, record: Any, where: str = "") -> RagExample:
        """Reads one record strictly: no unknown keys, no conversions but chunks as strings.

        A field that is null is a field left out: so do tables write it where rows differ.

        Args:
            record: A decoded JSON object.
            where: Named first in errors, e.g. ``'docs.jsonl, line 7'``.

        Raises:
            ValueError: In one line: where, which field, what was wanted and what came.
        """
        try:
            return cls(**_decode(cls, record))
        except ValueError as error:
            raise ValueError(f"{where}: {error}" if where else str(error)) from None


def write_jsonl(path: str | Path, examples: Iterable[RagExample]) -> int:
    """Writes one example a line and returns their number."""
    count = 0
    with open(path, "w", encoding="utf-8") as out:
        for example in examples:
            out.write(json.dumps(example.to_json(), ensure_ascii=False) + "\n")
            count += 1
    return count


def brief(value: Any) -> str:
    """``value`` as JSON on one short line, for error messages."""
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 60 else text[:57] + "..."


def field_error(name: str, wanted: str, got: Any) -> ValueError:
    """The one shape of a field's error."""
    return ValueError(f'field "{name}" must be {wanted}, got {brief(got)}')


def parse_chunk(value: Any, name: str) -> Chunk:
    """Reads a chunk: a plain string or ``{"text", "title"?}``.

    Raises:
        ValueError: If it is neither; ``name`` is the field in the message.
    """
    if isinstance(value, str):
        value = {"text": value}
    known = isinstance(value, Mapping) and "text" in value and not value.keys() - {"text", "title"}
    if not known:
        raise field_error(name, 'a string or {"text", "title"?}', value)
    try:
        return Chunk(**value)
    except ValueError as error:
        raise ValueError(f'field "{name}": {error}') from None


def _decode(cls, record: Any) -> dict[str, Any]:
    if not isinstance(record, Mapping):
        raise ValueError(f"must be an object, got {brief(record)}")
    known = [f.name for f in fields(cls)]
    if unknown := [key for key in record if key not in known]:
        near = difflib.get_close_matches(unknown[0], known, n=1, cutoff=0.7)
        hint = f'; did you mean "{near[0]}"?' if near else ""
        raise ValueError(f'unknown field "{unknown[0]}"; known: {", ".join(known)}{hint}')
    if missing := [key for key in ("question", "chunks") if record.get(key) is None]:
        raise ValueError(f'field "{missing[0]}" is missing; known: {", ".join(known)}')
    values = {key: value for key, value in record.items() if value is not None}
    chunks = values["chunks"]
    if not isinstance(chunks, list) or not chunks:
        hint = "a question needs at least one retrieved chunk"
        raise ValueError(f"{field_error('chunks', CHUNKS_WANTED, chunks)}; {hint}")
    values["chunks"] = tuple(parse_chunk(c, f"chunks[{i}]") for i, c in enumerate(chunks))
    for name in ("answers", "supporting"):
        if isinstance(values.get(name), list):
            values[name] = tuple(values[name])
    for name in ("followups", "conversation"):
        if isinstance(turns := values.get(name), list):
            values[name] = tuple(tuple(t) if isinstance(t, list) else t for t in turns)
    return values


def _check_field(example: RagExample, name: str, accepts, wanted: str) -> None:
    value = getattr(example, name)
    if not accepts(value):
        raise field_error(name, wanted, value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_texts(value: Any) -> bool:
    return isinstance(value, tuple) and all(map(_is_text, value))


def is_conversation(value: Any) -> bool:
    """Whether messages are such as every chat template takes; see `RagExample.conversation`."""
    if not _is_turns(value):
        return False
    roles = [role for role, _ in value]
    roles = roles[1:] if roles[:1] == ["system"] else roles
    return len(roles) % 2 == 1 and all(
        role == ("assistant" if index % 2 else "user") for index, role in enumerate(roles)
    )


def _is_turns(value: Any) -> bool:
    return isinstance(value, tuple) and all(_is_texts(turn) and len(turn) == 2 for turn in value)


def _is_chunks(value: Any) -> bool:
    return isinstance(value, tuple) and bool(value) and all(isinstance(c, Chunk) for c in value)


def _is_indices(value: Any, count: int) -> bool:
    return isinstance(value, tuple) and all(type(i) is int and 0 <= i < count for i in value)
