"""Chunkers: split a text or a conversation into spans; without overlap, these join to the text."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from heapq import heapify, heappop, heappush
from itertools import pairwise
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from blocktune.parsing import read
from blocktune.prompt.format import Chunk
from blocktune.registry import Registry, require_count, require_one_of

CHUNKERS = Registry("chunker", "blocktune.data.chunking")
"""Chunker classes by name, registered with ``@CHUNKERS.register("name")``, also by plug-ins."""
build_chunker = CHUNKERS.build

SPEAKERS = {"user": "User", "assistant": "Assistant", "system": "System", "tool": "Tool"}
"""How a message's role is written in front of its text in a chunk."""
_BLANK_LINES = re.compile(r"\A(?:[^\S\n]*\n)+")


class Message(NamedTuple):
    """One message of a conversation; ``role`` is a key of `SPEAKERS`."""

    role: str
    text: str
    is_learned: bool = True  # False: a reply that its data set excludes from training

    def __str__(self):
        return f"{SPEAKERS[self.role]}: {self.text}"


class Chunker(ABC):
    """Splits text into spans without changing it. A subclass's fields are its options."""

    @abstractmethod
    def split(self, text: str, tokenizer: PreTrainedTokenizerBase | None = None) -> list[str]:
        """Spans of a text, in order. Chunkers that count tokens need the tokenizer."""

    def split_messages(
        self, messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase | None = None
    ) -> list[str]:
        """Spans of a conversation; by default each message is split separately."""
        return [span for message in messages for span in self.split(str(message), tokenizer)]


def chunks_of(spans: Iterable[str], title: str | None = None) -> tuple[Chunk, ...]:
    """Makes chunks of spans, after `tidy`."""
    return tuple(Chunk(text, title) for text in tidy(spans))


def tidy(spans: Iterable[str]) -> list[str]:
    """Spans after `trimmed`, without blank ones.

    A span keeps the indent of its first line only if it starts at the start of a line.
    """
    texts, at_line_start = [], True
    for span in spans:
        if text := trimmed(span if at_line_start else span.lstrip(" \t")):
            texts.append(text)
        at_line_start = span.endswith("\n")
    return texts


def trimmed(text: str) -> str:
    """Removes leading blank lines and trailing white space; the first line keeps its indent."""
    return _BLANK_LINES.sub("", text).rstrip()


def parse_chunker(value: Any, where: str = "chunker") -> Chunker:
    """Reads a chunker from YAML: its name, or ``{name: fixed, size: 100}``."""
    entry = {"name": value} if isinstance(value, str) else value
    if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str):
        raise ValueError(f"{where}: must be a name or {{name, ...}}, got {value!r:.60}")
    try:
        chunker = CHUNKERS.find(entry["name"])
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return read(chunker, {key: given for key, given in entry.items() if key != "name"}, where)


STRONGEST_FIRST = ("\n\n", "\r\n\r\n", "---", "===", "\n\t", "\n")


@CHUNKERS.register("delimiter")
class Delimiter(Chunker):
    """Splits after each occurrence of one delimiter, then joins the shortest neighbours."""

    # None: the first of these in the text: blank line, ``---``, ``===``, newline + tab, newline
    delimiter: str | None = None
    max_chunks: int = 14  # as many are left by joining; Block-Attention has fewer than 15 chunks

    def __post_init__(self):
        if self.delimiter == "":
            raise ValueError("delimiter must not be empty; leave it out")
        require_count("max_chunks", self.max_chunks, 1)

    def split(self, text: str, tokenizer: PreTrainedTokenizerBase | None = None) -> list[str]:
        candidates = STRONGEST_FIRST if self.delimiter is None else (self.delimiter,)
        delimiter = next((mark for mark in candidates if mark in text.strip()), None)
        if delimiter is None:
            return [text]
        *parts, last = text.split(delimiter)
        cuts, end, has_text = [0], 0, False
        for span in (*(part + delimiter for part in parts), last):
            # A blank span is joined to the span before it, at the start to the span after it.
            if has_text and span.strip():
                cuts.append(end)
            has_text = has_text or bool(span.strip())
            end += len(span)
        return [text[a:b] for a, b in pairwise(_fewest_cuts([*cuts, end], self.max_chunks))]


def _fewest_cuts(cuts: list[int], most: int) -> list[int]:
    """Removes the inner cut whose neighbours are closest until ``most`` spans are left."""
    after, before = dict(pairwise(cuts)), {cut: left for left, cut in pairwise(cuts)}
    # A queue, since a text may have a million lines: joined length, start and inner cut of a pair.
    pairs = [(after[cut] - left, left, cut) for left, cut in pairwise(cuts[:-1])]
    heapify(pairs)
    while len(after) > most:
        length, left, cut = heappop(pairs)
        if cut not in after or length != after[cut] - before[cut]:
            continue  # removed, or a neighbour of it was
        after[left] = right = after.pop(cut)
        before[right] = left
        for inner in (left, right):
            if inner in before and inner in after:
                heappush(pairs, (after[inner] - before[inner], before[inner], inner))
    return [*after, cuts[-1]]


@CHUNKERS.register("fixed")
class Fixed(Chunker):
    """Splits after every ``size`` tokens of the model's tokenizer, with an ``overlap``.

    Tokenised by itself, a span may have a token more or less at either end. Source: KVLink splits
    XSum every 100 tokens; TurboRAG documents every 512 with an overlap of 10.
    """

    size: int = 100  # tokens per span
    overlap: int = 0  # tokens that a span shares with the previous span

    def __post_init__(self):
        require_count("overlap", self.overlap)
        require_count("size", self.size, self.overlap + 1, "more than the overlap")

    def split(self, text: str, tokenizer: PreTrainedTokenizerBase | None = None) -> list[str]:
        if tokenizer is None or not tokenizer.is_fast:
            got = "none" if tokenizer is None else f"the slow '{tokenizer.name_or_path}'"
            raise ValueError(
                f"chunker 'fixed' needs a fast tokenizer, got {got}; name one, tokenizer=MODEL"
            )
        encoded = tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        # A span ends where the token after it starts: no character between tokens is lost.
        starts = [0, *(start for start, _ in encoded["offset_mapping"][1:])]
        ends = [*starts[self.size :], *[len(text)] * self.size]
        firsts = range(0, max(1, len(starts) - self.overlap), self.size - self.overlap)
        return [text[starts[first] : ends[first]] for first in firsts]


@CHUNKERS.register("sentence")
class Sentence(Chunker):
    """Groups whole sentences, which the library sentencex detects."""

    size: int = 4  # sentences per span
    language: str = "en"  # ISO code; about 240 languages are supported

    def __post_init__(self):
        require_count("size", self.size, 1)

    def split(self, text: str, tokenizer: PreTrainedTokenizerBase | None = None) -> list[str]:
        sentences = sentences_of(text, self.language)
        starts = range(0, len(sentences), self.size)
        return ["".join(sentences[start : start + self.size]) for start in starts] or [text]


def sentences_of(text: str, language: str = "en") -> list[str]:
    """Splits a text into sentences, which join to it again. Joins blank ones to others."""
    from sentencex import segment

    sentences: list[str] = []
    for span in segment(language, text):
        if sentences and not span.strip():
            sentences[-1] += span
        else:
            sentences.append(span)
    return sentences


@CHUNKERS.register("message")
class PerMessage(Chunker):
    """Makes each turn or message a chunk. A single text is split as by `Delimiter`."""

    # ``turn``: a user message with its replies (KVLink), or a system message; or ``message``
    unit: str = "turn"

    def __post_init__(self):
        require_one_of("unit", self.unit, ("turn", "message"))

    def split(self, text: str, tokenizer: PreTrainedTokenizerBase | None = None) -> list[str]:
        return Delimiter().split(text)

    def split_messages(
        self, messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase | None = None
    ) -> list[str]:
        spans: list[str] = []
        for before, message in zip((None, *messages), messages, strict=False):
            starts = message.role in ("user", "system") or self.unit == "message"
            if starts or before is None or before.role == "system":
                spans.append(str(message))
            else:
                spans[-1] += f"\n{message}"
        return spans
