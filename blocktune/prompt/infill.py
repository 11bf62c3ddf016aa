"""EFIM's prompts for infilling, to which typing only appends tokens.

EFIM puts the text typed since the first request after the suffix: ``PRE old prefix SUF suffix MID
typed``. Each typed piece is tokenised by itself, so no earlier token changes, and `prefix-cache`
resumes the whole last prompt.

Source: EFIM, arXiv:2505.21889. Ordinary models are bad at continuing a word from the middle of a
token; the paper trains on pieces of text that were tokenised separately.
"""

from __future__ import annotations

import threading

from transformers import PreTrainedTokenizerBase

from blocktune.prompt.pieces import Pieces
from blocktune.prompt.special_tokens import encode, with_bos

MARKERS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen, Granite, Gemma
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder
    ("\u2581<PRE>", "\u2581<SUF>", "\u2581<MID>"),  # Code Llama
    ("<\uff5cfim\u2581begin\uff5c>", "<\uff5cfim\u2581hole\uff5c>", "<\uff5cfim\u2581end\uff5c>"),
)
"""Tokens that start the prefix, the suffix and the middle; the last row is DeepSeek-Coder's."""
MOST_PLACES = 64  # at which a user types; the oldest are forgotten


class Infill:
    """Makes the prompts of one user. ValueError if the tokenizer has none of the `MARKERS`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        vocabulary = tokenizer.get_vocab()
        supported = [row for row in MARKERS if all(token in vocabulary for token in row)]
        if not supported:
            raise ValueError(
                f"'{tokenizer.name_or_path}' has no infilling tokens; use a code model"
            )
        self.tokenizer, self._lock = tokenizer, threading.Lock()
        self._markers = [(vocabulary[token],) for token in supported[0]]
        # By suffix: the pieces of the prefix, and how many of them come before the suffix.
        self._places: dict[str, tuple[list[str], int]] = {}

    def pieces(self, prefix: str, suffix: str) -> Pieces:
        """The prompt for the text between ``prefix`` and ``suffix``, without chunks.

        If the prefix continues an earlier one with the same suffix, that prompt is extended.
        Otherwise the suffix comes after the whole prefix. Known pieces are never tokenised again.
        """
        with self._lock:
            old, before = self._places.pop(suffix, ([], 0))
            parts = _continued(prefix, old)
            if not before or parts[:before] != old[:before]:
                others = [_continued(prefix, other) for other, _ in self._places.values()]
                parts = max([*others, parts], key=lambda pieces: sum(map(len, pieces[:-1])))
                before = len(parts)
            self._places[suffix] = parts, before
            if len(self._places) > MOST_PLACES:
                self._places.pop(next(iter(self._places)))
        typed = [encode(self.tokenizer, part, split_special_tokens=True) for part in parts]
        after = encode(self.tokenizer, suffix, split_special_tokens=True)
        first, second, third = self._markers
        ids = first + sum(typed[:before], ()) + second + after + third + sum(typed[before:], ())
        ids = with_bos(self.tokenizer, ids)
        return Pieces(ids[:-1], (), ids[-1:])


def _continued(prefix: str, parts: list[str]) -> list[str]:
    """Splits ``prefix`` into the leading ``parts`` that it starts with, and the rest."""
    pieces, at = [], 0
    for part in parts:
        if not prefix.startswith(part, at):
            break
        pieces.append(part)
        at += len(part)
    return [*pieces, prefix[at:]] if at < len(prefix) or not pieces else pieces
