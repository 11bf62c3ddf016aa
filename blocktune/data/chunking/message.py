"""Cuts a conversation between its messages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from blocktune.data.chunking.base import CHUNKERS, Chunker, Message
from blocktune.data.chunking.delimiter import Delimiter

UNITS = ("turn", "message")


@CHUNKERS.register("message")
@dataclass(frozen=True)
class PerMessage(Chunker):
    """Makes each turn or message a chunk; a single text is cut at its delimiters.

    Attributes:
        unit: ``turn``, a user message with its replies (KVLink), or ``message`` (Block-Attention).
            A system message is a chunk of its own.

    Source: Block-Attention cuts conversations by message and single questions by delimiter.
    """

    unit: str = "turn"

    def __post_init__(self):
        self._require("unit", self.unit in UNITS, " or ".join(UNITS))

    def split(self, text: str, tokenizer: PreTrainedTokenizerBase | None = None) -> list[str]:
        """Spans of `Delimiter`."""
        return Delimiter().split(text)

    def split_messages(
        self, messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase | None = None
    ) -> list[str]:
        """A turn starts with a user message, or after a system message."""
        spans: list[list[str]] = []
        before = None
        for message in messages:
            opens = message.role in ("user", "system") or before in (None, "system")
            if opens or self.unit == "message":
                spans.append([])
            spans[-1].append(str(message))
            before = message.role
        return ["\n".join(span) for span in spans]
