"""Cuts after a fixed number of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from transformers import PreTrainedTokenizerBase

from blocktune.data.chunking.base import CHUNKERS, Chunker


@CHUNKERS.register("fixed")
@dataclass(frozen=True)
class Fixed(Chunker):
    """Cuts every ``size`` tokens of the model's tokenizer, with an ``overlap``.

    Spans are slices of the text, found by the tokenizer's offsets; tokenized separately, a span
    may have one token more or less at its ends.

    Attributes:
        size: Tokens of a span.
        overlap: Tokens that a span shares with the previous one.

    Source: KVLink cuts XSum every 100 tokens; TurboRAG documents every 512 with 10 of overlap.
    """

    needs_tokenizer: ClassVar[bool] = True
    size: int = 100
    overlap: int = 0

    def __post_init__(self):
        self._require("size", type(self.size) is int and self.size >= 1, "an integer of at least 1")
        fits = type(self.overlap) is int and 0 <= self.overlap < self.size
        self._require("overlap", fits, f"an integer from 0 to {self.size - 1}, less than size")

    def split(self, text: str, tokenizer: PreTrainedTokenizerBase | None = None) -> list[str]:
        """Spans of ``size`` tokens.

        Raises:
            ValueError: If there is no tokenizer, or it has no offsets.
        """
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
        starts = [start for start, _ in encoded["offset_mapping"]]
        return _spans(text, starts, self.size, self.overlap)


def _spans(text: str, starts: list[int], size: int, overlap: int) -> list[str]:
    """A span reaches from its first token's start to the start of the token after its last."""
    spans = []
    for first in range(0, max(1, len(starts)), size - overlap):
        left = starts[first] if first else 0
        end = first + size
        spans.append(text[left : starts[end] if end < len(starts) else len(text)])
        if end >= len(starts):
            break
    return spans
