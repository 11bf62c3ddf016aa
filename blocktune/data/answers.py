"""Whether a text contains an accepted answer."""

from __future__ import annotations

import re
from collections.abc import Iterable

from blocktune.data.example import RagExample
from blocktune.prompt.format import Chunk

VERDICTS = ("yes", "no")

_WORDS = re.compile(r"\w+")


def mentions(text: str, answers: Iterable[str]) -> bool:
    """Whether the text contains the words of an answer, in order, in any case."""
    padded = f" {_plain(text)} "
    return any(f" {words} " in padded for words in map(_plain, answers) if words)


def gives_answer(reply: str, answers: Iterable[str]) -> bool:
    """Whether a reply mentions an answer, or starts with it if the answer is yes or no."""
    verdicts, named = _apart(answers)
    first, _, _ = _plain(reply).partition(" ")
    return first in verdicts or mentions(reply, named)


def holds_answer(example: RagExample, whole: RagExample | None = None) -> bool:
    """Whether an example's chunks can give an answer.

    They mention it; or it is yes or no, and all chunks that support it in ``whole``, the question
    with all chunks of its source, are among them.
    """
    verdicts, named = _apart(example.answers)
    if any(chunk_mentions(chunk, named) for chunk in example.chunks):
        return True
    supported = whole is not None and len(example.supporting) == len(whole.supporting) > 0
    return bool(verdicts) and supported


def is_verdict(example: RagExample) -> bool:
    """Whether an answer is yes or no."""
    return bool(_apart(example.answers)[0])


def chunk_mentions(chunk: Chunk, answers: Iterable[str]) -> bool:
    """Whether a chunk's title or text mentions an answer."""
    return mentions(f"{chunk.title or ''}\n{chunk.text}", answers)


def evidence(example: RagExample) -> frozenset[int]:
    """Indices of chunks that must not be dropped.

    The supporting ones, else those that mention an answer other than yes and no, else all.
    """
    if example.supporting:
        return frozenset(example.supporting)
    _, named = _apart(example.answers)
    found = frozenset(
        index for index, chunk in enumerate(example.chunks) if chunk_mentions(chunk, named)
    )
    return found or frozenset(range(len(example.chunks)))


def _apart(answers: Iterable[str]) -> tuple[set[str], list[str]]:
    """Answers that are yes or no, and all others."""
    answers = list(answers)
    verdicts = {_plain(answer) for answer in answers} & set(VERDICTS)
    return verdicts, [answer for answer in answers if _plain(answer) not in VERDICTS]


def _plain(text: str) -> str:
    return " ".join(_WORDS.findall(text.casefold()))
