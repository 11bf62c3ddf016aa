"""Where an accepted answer stands in a text."""

from __future__ import annotations

import re
from collections.abc import Iterable

from blocktune.data.example import RagExample
from blocktune.prompt.chunk import Chunk

_WORDS = re.compile(r"\w+")


def mentions(text: str, answers: Iterable[str]) -> bool:
    """Whether the words of an answer stand in the text, in order, whatever their case."""
    padded = f" {_plain(text)} "
    return any(f" {words} " in padded for words in map(_plain, answers) if words)


def chunk_mentions(chunk: Chunk, answers: Iterable[str]) -> bool:
    """Whether a chunk's title or text mentions an answer."""
    return mentions(f"{chunk.title or ''}\n{chunk.text}", answers)


def evidence(example: RagExample) -> frozenset[int]:
    """Indices of chunks that must not be dropped.

    The supporting ones; where the source names none, those that mention an answer; where none
    does, all.
    """
    if example.supporting:
        return frozenset(example.supporting)
    found = frozenset(
        index
        for index, chunk in enumerate(example.chunks)
        if chunk_mentions(chunk, example.answers)
    )
    return found or frozenset(range(len(example.chunks)))


def _plain(text: str) -> str:
    return " ".join(_WORDS.findall(text.casefold()))
