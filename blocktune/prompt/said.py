"""What people said, among text that steers the model: special tokens in it stay text."""

from __future__ import annotations

import re

from transformers import PreTrainedTokenizerBase

from blocktune.prompt.encoding import encode, special_tokens


class Said:
    """Texts of one prompt that go through a chat template.

    A user who asks about ``<|eot_id|>`` does not end the turn. A text that holds special tokens is
    replaced by a word while the template renders and read apart; all others are read in one go
    with what stands around them.

    Args:
        tokenizer: Of the model.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self._apart: dict[str, str] = {}

    def safe(self, text: str) -> str:
        """The text, or the word in its place."""
        if not any(token in text for token in special_tokens(self._tokenizer)):
            return text
        word = f"BlocktuneText{len(self._apart)}StandsHere"
        self._apart[word] = text
        return word

    def encode(self, rendered: str) -> tuple[int, ...]:
        """Token ids of what the template made of the texts."""
        if not self._apart:
            return encode(self._tokenizer, rendered)
        ids: tuple[int, ...] = ()
        for part in re.split(f"({'|'.join(self._apart)})", rendered):
            text = self._apart.get(part, part)
            ids += encode(self._tokenizer, text, split_special_tokens=part in self._apart)
        return ids
