"""EFIM's prompts for infilling, whose tokens only grow while somebody types.

A prompt ``PRE prefix SUF suffix MID`` changes in its middle with every typed word, so that nothing
after it can be reused. EFIM puts what was typed since the first request behind the suffix: ``PRE
old prefix SUF suffix MID typed``. Each typed piece is tokenised by itself, so no earlier token
changes, and `prefix-cache` resumes the whole of the last prompt.

Source: EFIM, arXiv:2505.21889. Models trained as usual write words badly that begin in the middle
of a token; the paper trains on pieces of text that were tokenised apart.
"""

from __future__ import annotations

import threading
from collections import OrderedDict

from transformers import PreTrainedTokenizerBase

from blocktune.prompt.pieces import Pieces
from blocktune.prompt.special_tokens import encode, with_bos

MARKERS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen, Granite, Gemma
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder
    ("\u2581<PRE>", "\u2581<SUF>", "\u2581<MID>"),  # Code Llama
    ("<\uff5cfim\u2581begin\uff5c>", "<\uff5cfim\u2581hole\uff5c>", "<\uff5cfim\u2581end\uff5c>"),
)
"""What opens the prefix, the suffix and the middle; the last row is DeepSeek-Coder's."""


class Infill:
    """Makes the prompts of one user, who types in up to ``most`` places at a time.

    Raises ValueError if the tokenizer has none of the `MARKERS`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, most: int = 64):
        known = tokenizer.get_vocab()
        found = [row for row in MARKERS if all(token in known for token in row)]
        if not found:
            raise ValueError(
                f"tokenizer '{tokenizer.name_or_path}' has no tokens for infilling (such as "
                f"{MARKERS[0][0]}); use a code model that was trained to fill in the middle"
            )
        self.tokenizer, self.most, self._lock = tokenizer, most, threading.Lock()
        self._markers = [(known[token],) for token in found[0]]
        # By suffix: the prefix in pieces, and how many of them stand before the suffix.
        self._places: OrderedDict[str, tuple[list[str], int]] = OrderedDict()

    def pieces(self, prefix: str, suffix: str) -> Pieces:
        """The prompt for the text between ``prefix`` and ``suffix``, without chunks.

        A prefix that continues an earlier one with the same suffix extends its prompt. Otherwise
        the suffix stands after the whole prefix, whose pieces stay as they were tokenised before.
        """
        with self._lock:
            old, before = self._places.pop(suffix, ([], 0))
            parts = _continued(prefix, old)
            if not before or parts[:before] != old[:before]:
                others = [_continued(prefix, other) for other, _ in self._places.values()]
                parts = max([*others, parts], key=lambda one: sum(map(len, one[:-1])))
                before = len(parts)
            self._places[suffix] = parts, before
            while len(self._places) > self.most:
                self._places.popitem(last=False)
        read = [encode(self.tokenizer, part, split_special_tokens=True) for part in parts]
        after = encode(self.tokenizer, suffix, split_special_tokens=True)
        first, second, third = self._markers
        ids = first + sum(read[:before], ()) + second + after + third + sum(read[before:], ())
        ids = with_bos(self.tokenizer, ids)
        return Pieces(ids[:-1], (), ids[-1:])


def _continued(prefix: str, parts: list[str]) -> list[str]:
    """``prefix`` in pieces, of which the first are those ``parts`` that it begins with."""
    kept, at = [], 0
    for part in parts:
        if not prefix.startswith(part, at):
            break
        kept.append(part)
        at += len(part)
    return [*kept, prefix[at:]] if at < len(prefix) or not kept else kept
