"""The built-in chunkers: at delimiters, after a number of tokens or sentences, between messages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from transformers import PreTrainedTokenizerBase

from blocktune.data.chunking import CHUNKERS, Chunker, Message

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
        given, count = self.delimiter, self.max_chunks
        is_text = given is None or (isinstance(given, str) and given != "")
        self._require("delimiter", is_text, "a non-empty string or null")
        self._require("max_chunks", type(count) is int and count >= 1, "an integer of at least 1")

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

    needs_tokenizer: ClassVar[bool] = True
    size: int = 100  # tokens of a span
    overlap: int = 0  # tokens that a span shares with the previous one

    def __post_init__(self):
        self._require("size", type(self.size) is int and self.size >= 1, "an integer of at least 1")
        fits = type(self.overlap) is int and 0 <= self.overlap < self.size
        self._require("overlap", fits, f"an integer from 0 to {self.size - 1}, less than size")

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
        self._require("size", type(self.size) is int and self.size >= 1, "an integer of at least 1")
        self._require("language", isinstance(self.language, str), "an ISO code such as en")

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
        self._require("unit", self.unit in UNITS, " or ".join(UNITS))

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
