"""Chunkers cut a long text or a conversation into spans that are cached separately.

They cut at delimiters, after a number of tokens or sentences, or between messages. The spans of a
text, joined, are the text.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from blocktune.prompt.format import Chunk
from blocktune.registry import Registry, require_count, require_one_of

CHUNKERS = Registry("chunker", "blocktune.data.chunking")
"""A class of this file, or of a plug-in, is registered by ``@CHUNKERS.register("name")``."""
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

    @abstractmethod
    def split(self, text: str, tokenizer: PreTrainedTokenizerBase | None = None) -> list[str]:
        """Spans of a text, in order; one that counts tokens needs the tokenizer."""

    def split_messages(
        self, messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase | None = None
    ) -> list[str]:
        """Spans of a conversation; by default each message is cut separately."""
        return [span for message in messages for span in self.split(str(message), tokenizer)]


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


STRONGEST_FIRST = ("\n\n", "---", "===", "\n\t", "\n")
UNITS = ("turn", "message")


@CHUNKERS.register("delimiter")
@dataclass(frozen=True)
class Delimiter(Chunker):
    """Cuts after each occurrence of one delimiter, then joins the shortest neighbours.

    Source: Block-Attention, ``src/data/tools.py`` (fewer than 15 chunks).
    """

    # what to cut after; None uses the first of a blank line, ``---``, ``===``, newline and tab,
    # newline, that the text contains
    delimiter: str | None = None
    max_chunks: int = 14  # neighbours with the fewest characters are joined down to this number

    def __post_init__(self):
        if self.delimiter == "":
            raise ValueError("chunker 'delimiter': delimiter must not be empty; leave it out")
        require_count("chunker 'delimiter': max_chunks", self.max_chunks, 1)

    def split(self, text: str, tokenizer: PreTrainedTokenizerBase | None = None) -> list[str]:
        """Spans that end with the delimiter, except perhaps the last."""
        among = STRONGEST_FIRST if self.delimiter is None else (self.delimiter,)
        found = next((mark for mark in among if mark in text.strip()), None)
        if found is None:
            return [text]
        spans: list[str] = []
        *parts, last = text.split(found)
        for span in [*(part + found for part in parts), *([last] if last else [])]:
            # A span without text belongs to the one before, at the start to the one after.
            if spans and not (span.strip() and spans[-1].strip()):
                spans[-1] += span
            else:
                spans.append(span)
        sizes = np.array([len(span) for span in spans])
        while len(spans) > self.max_chunks:
            at = int(np.argmin(sizes[:-1] + sizes[1:]))
            spans[at : at + 2] = [spans[at] + spans[at + 1]]
            sizes[at] += sizes[at + 1]
            sizes = np.delete(sizes, at + 1)  # numpy, since web pages have thousands of lines
        return spans


@CHUNKERS.register("fixed")
@dataclass(frozen=True)
class Fixed(Chunker):
    """Cuts every ``size`` tokens of the model's tokenizer, with an ``overlap``.

    Spans are slices of the text, found by the tokenizer's offsets; tokenized separately, a span
    may have one token more or less at its ends.

    Source: KVLink cuts XSum every 100 tokens; TurboRAG documents every 512 with 10 of overlap.
    """

    size: int = 100  # tokens of a span
    overlap: int = 0  # tokens that a span shares with the previous one

    def __post_init__(self):
        require_count("chunker 'fixed': overlap", self.overlap)
        require_count("chunker 'fixed': size", self.size, self.overlap + 1, "more than the overlap")

    def split(self, text: str, tokenizer: PreTrainedTokenizerBase | None = None) -> list[str]:
        """Spans of ``size`` tokens."""
        if tokenizer is None:
            raise ValueError(
                "chunker 'fixed' counts tokens and has no tokenizer; name one: tokenizer=MODEL"
            )
        if not tokenizer.is_fast:
            raise ValueError(
                f"chunker 'fixed' needs the offsets of a fast tokenizer, "
                f"'{tokenizer.name_or_path}' is slow; use chunker 'sentence'"
            )
        encoded = tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        # A span reaches from its first token's start to the start of the token after its last.
        starts = [start for start, _ in encoded["offset_mapping"]]
        count, spans = max(1, len(starts)), []
        for first in range(0, count, self.size - self.overlap):
            end = first + self.size
            left = starts[first] if first else 0
            spans.append(text[left : starts[end] if end < count else len(text)])
            if end >= count:
                break
        return spans


@CHUNKERS.register("sentence")
@dataclass(frozen=True)
class Sentence(Chunker):
    """Groups whole sentences, found by the library sentencex."""

    size: int = 4  # sentences of a span
    language: str = "en"  # ISO code of one of about 240 languages

    def __post_init__(self):
        require_count("chunker 'sentence': size", self.size, 1)

    def split(self, text: str, tokenizer: PreTrainedTokenizerBase | None = None) -> list[str]:
        """Spans of ``size`` sentences, each with the space after it."""
        sentences = sentences_of(text, self.language)
        starts = range(0, len(sentences), self.size)
        return ["".join(sentences[start : start + self.size]) for start in starts] or [text]


def sentences_of(text: str, language: str = "en") -> list[str]:
    """Sentences whose concatenation is the text; blank ones are joined to the previous one."""
    from sentencex import segment

    sentences: list[str] = []
    for span in segment(language, text):
        if sentences and not span.strip():
            sentences[-1] += span
        else:
            sentences.append(span)
    return sentences


@CHUNKERS.register("message")
@dataclass(frozen=True)
class PerMessage(Chunker):
    """Makes each turn or message a chunk; a single text is cut at its delimiters.

    A turn is a user message with its replies (KVLink). A system message is a chunk of its own.

    Source: Block-Attention cuts conversations by message and single questions by delimiter.
    """

    unit: str = "turn"

    def __post_init__(self):
        require_one_of("chunker 'message': unit", self.unit, UNITS)

    def split(self, text: str, tokenizer: PreTrainedTokenizerBase | None = None) -> list[str]:
        """Spans of `Delimiter`."""
        return Delimiter().split(text)

    def split_messages(
        self, messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase | None = None
    ) -> list[str]:
        """A turn starts with a user message, or after a system message."""
        spans: list[list[str]] = []
        before = None
        for message in messages:
            opens = message.role in ("user", "system") or before in (None, "system")
            if opens or self.unit == "message":
                spans.append([])
            spans[-1].append(str(message))
            before = message.role
        return ["\n".join(span) for span in spans]
