"""Cuts at the strongest delimiter that the text contains, such as blank lines."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from blocktune.data.chunking.base import CHUNKERS, Chunker

STRONGEST_FIRST = ("\n\n", "---", "===", "\n\t", "\n")


@CHUNKERS.register("delimiter")
@dataclass(frozen=True)
class Delimiter(Chunker):
    """Cuts after each occurrence of one delimiter, then joins the shortest neighbours.

    Attributes:
        delimiter: What to cut after; None uses the first of a blank line, ``---``, ``===``,
            newline and tab, newline, that the text contains.
        max_chunks: Neighbours with the fewest characters are joined down to this number.

    Source: Block-Attention, ``src/data/tools.py`` (fewer than 15 chunks).
    """

    delimiter: str | None = None
    max_chunks: int = 14

    def __post_init__(self):
        given = self.delimiter
        self._require(
            "delimiter",
            given is None or (isinstance(given, str) and given != ""),
            "a non-empty string or null",
        )
        count = self.max_chunks
        self._require("max_chunks", type(count) is int and count >= 1, "an integer of at least 1")

    def split(self, text: str, tokenizer: PreTrainedTokenizerBase | None = None) -> list[str]:
        """Spans that end with the delimiter, except perhaps the last."""
        among = STRONGEST_FIRST if self.delimiter is None else (self.delimiter,)
        found = next((mark for mark in among if mark in text.strip()), None)
        if found is None:
            return [text]
        parts = text.split(found)
        spans = [part + found for part in parts[:-1]] + ([parts[-1]] if parts[-1] else [])
        return _join_shortest(_join_blank(spans), self.max_chunks)


def _join_blank(spans: list[str]) -> list[str]:
    """Spans without text belong to the one before (at the start: to the one after)."""
    joined: list[str] = []
    for span in spans:
        if joined and not (span.strip() and joined[-1].strip()):
            joined[-1] += span
        else:
            joined.append(span)
    return joined


def _join_shortest(spans: list[str], count: int) -> list[str]:
    spans, sizes = list(spans), np.array([len(span) for span in spans])
    while len(spans) > count:
        at = int(np.argmin(sizes[:-1] + sizes[1:]))
        spans[at : at + 2] = [spans[at] + spans[at + 1]]
        sizes[at] += sizes[at + 1]
        sizes = np.delete(sizes, at + 1)  # numpy, since web pages have thousands of lines
    return spans
