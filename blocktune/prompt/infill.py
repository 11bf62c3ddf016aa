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
from dataclasses import dataclass, field

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


@dataclass
class _Session:
    """One place in a text: pieces of its prefix, of which ``before`` stand before the suffix."""

    parts: list[str] = field(default_factory=list)
    before: int = 0


class Infill:
    """Makes the prompts of one user, who types in up to ``most`` places at a time.

    ```python
    infill = Infill(engine.tokenizer)
    run = engine.start([infill.pieces("def add(a, b): ", "print(add(1, 2))")], "prefix-cache")
    answer = run.answers(Sampling(), 32, streams=(0,))[0]
    ```

    Raises:
        ValueError: If the tokenizer has none of the `MARKERS`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, most: int = 64):
        known = tokenizer.get_vocab()
        found = [row for row in MARKERS if all(token in known for token in row)]
        if not found:
            raise ValueError(
                f"tokenizer '{tokenizer.name_or_path}' has no tokens for infilling (such as "
                f"{MARKERS[0][0]}); use a code model that was trained to fill in the middle"
            )
        self.tokenizer, self.most = tokenizer, most
        self._markers = [(known[token],) for token in found[0]]
        self._sessions: OrderedDict[str, _Session] = OrderedDict()  # by suffix
        self._lock = threading.Lock()

    def pieces(self, prefix: str, suffix: str) -> Pieces:
        """The prompt for the text between ``prefix`` and ``suffix``, without chunks.

        A prefix that continues an earlier one with the same suffix extends its prompt. Otherwise
        the suffix stands after the whole prefix, whose pieces stay as they were tokenised before.
        """
        with self._lock:
            session = self._sessions.pop(suffix, None)
            parts = _continued(prefix, session.parts) if session else []
            if session and parts[: session.before] == session.parts[: session.before]:
                before = session.before
            else:
                others = (other.parts for other in self._sessions.values())
                old = max((_continued(prefix, one) for one in [*others, parts]), key=_shared)
                parts, before = old, len(old)
            self._sessions[suffix] = _Session(parts, before)
            while len(self._sessions) > self.most:
                self._sessions.popitem(last=False)
        first, second, third = self._markers
        read = [encode(self.tokenizer, part, split_special_tokens=True) for part in parts]
        after = encode(self.tokenizer, suffix, split_special_tokens=True)
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


def _shared(parts: list[str]) -> int:
    """Characters that were known."""
    return sum(map(len, parts[:-1]))
