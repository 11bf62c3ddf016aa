"""What needles are hidden in."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import count, cycle
from pathlib import Path

from blocktune.data.chunking.sentence import sentences_of
from blocktune.data.worlds import WorldConfig, generate_examples

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
"""RULER's filler, repeated."""


class Essay:
    """Sentences of prose, as many as are asked for; the same ones first every time.

    RULER takes Paul Graham's essays, which cannot be shipped; a file of them (text, or its JSON
    with ``"text"``) may be named. Without a file, the sentences are those of made-up passages.

    Args:
        file: Text to take sentences from, over and over; None generates them.
    """

    def __init__(self, file: str | None = None):
        self._source = _from_file(file) if file else _from_worlds()
        self._read: list[str] = []

    def first(self, number: int) -> list[str]:
        """The first ``number`` sentences."""
        while len(self._read) < number:
            self._read.append(next(self._source))
        return self._read[:number]


def _from_file(file: str) -> Iterator[str]:
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"no haystack at '{file}'; give a text file, or JSON with a \"text\"")
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        text = _text_of(path.name, text)
    sentences = [s.strip() for s in sentences_of(re.sub(r"\s+", " ", text)) if s.strip()]
    if not sentences:
        raise ValueError(f"{path.name} holds no sentence; give a text file")
    return cycle(sentences)


def _text_of(name: str, text: str) -> str:
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name}, line {error.lineno}: not JSON ({error.msg})") from None
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise ValueError(f'{name}: field "text" must be a string, got {str(record)[:60]}')
    return record["text"]


def _from_worlds() -> Iterator[str]:
    """Passages of the split ``test``; a world is drawn after the other, so they never end."""
    for seed in count():
        config = WorldConfig(split="test", seed=seed, num_examples=50)
        for example in generate_examples(config):
            for chunk in example.chunks:
                yield from (s.strip() for s in sentences_of(chunk.text) if s.strip())
