"""Cuts between sentences."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from blocktune.data.chunking.base import CHUNKERS, Chunker


@CHUNKERS.register("sentence")
@dataclass(frozen=True)
class Sentence(Chunker):
    """Groups whole sentences, found by the library sentencex.

    Attributes:
        size: Sentences of a span.
        language: ISO code of one of about 240 languages.
    """

    size: int = 4
    language: str = "en"

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
