"""Chunkers cut a long text or a conversation into spans that are cached separately.

The spans of a text, joined, are the text. `chunkers` holds the built-in ones.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from transformers import PreTrainedTokenizerBase

from blocktune.prompt.format import Chunk
from blocktune.registry import Registry

CHUNKERS = Registry("chunker", "blocktune.data.chunking")
"""A file of this folder, or a plug-in, registers one by ``@CHUNKERS.register("name")``."""
build_chunker = CHUNKERS.build

SPEAKERS = {"user": "User", "assistant": "Assistant", "system": "System", "tool": "Tool"}
"""How a message's role is written in front of its text."""
_BLANK_LINES = re.compile(r"\A(?:[^\S\n]*\n)+")


class Message(NamedTuple):
    """One message of a conversation; ``role`` is a key of `SPEAKERS`."""

    role: str
    text: str

    def __str__(self):
        return f"{SPEAKERS[self.role]}: {self.text}"


@dataclass(frozen=True)
class Chunker(ABC):
    """Cuts text into spans without changing it; the fields of a subclass are its keys in YAML."""

    needs_tokenizer: ClassVar[bool] = False

    @abstractmethod
    def split(self, text: str, tokenizer: PreTrainedTokenizerBase | None = None) -> list[str]:
        """Spans of a text, in order; one that counts tokens needs the tokenizer."""

    def split_messages(
        self, messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase | None = None
    ) -> list[str]:
        """Spans of a conversation; by default each message is cut separately."""
        return [span for message in messages for span in self.split(str(message), tokenizer)]

    def _require(self, field: str, accepted: bool, wanted: str) -> None:
        if not accepted:
            name = CHUNKERS.name_of(self)
            raise ValueError(
                f"chunker '{name}': {field} must be {wanted}, got {getattr(self, field)!r}"
            )


def chunks_of(spans: Iterable[str], title: str | None = None) -> tuple[Chunk, ...]:
    """Chunks of the spans after `tidy`."""
    return tuple(Chunk(text, title) for text in tidy(spans))


def tidy(spans: Iterable[str]) -> list[str]:
    """Non-blank spans, without leading blank lines and trailing space.

    If a span ends within a line, the next has no indent to keep.
    """
    texts, opens_line = [], True
    for span in spans:
        if text := trimmed(span if opens_line else span.lstrip(" \t")):
            texts.append(text)
        opens_line = span.endswith("\n")
    return texts


def trimmed(text: str) -> str:
    """Text without leading blank lines and trailing space; its first line keeps its indent."""
    return _BLANK_LINES.sub("", text).rstrip()


def parse_chunker(value: Any, where: str = "chunker") -> Chunker:
    """Reads a chunker from YAML: its name, or ``{name: fixed, size: 100}``."""
    entry = {"name": value} if isinstance(value, str) else value
    if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str):
        raise ValueError(f"{where}: must be a name or {{name, ...}}, got {value!r:.60}")
    parameters = {key: given for key, given in entry.items() if key != "name"}
    try:
        return CHUNKERS.build(entry["name"], **parameters)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None
