"""Text to token ids, from several threads at once."""

from __future__ import annotations

import threading

from transformers import PreTrainedTokenizerBase

_ONE_AT_A_TIME = threading.Lock()
"""Whether special tokens are split is a state of a fast tokenizer, set anew by every call: between
the setting and the reading of it another thread's call would change how this one's text is read."""


def encode(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    add_special_tokens: bool = False,
    split_special_tokens: bool = False,
) -> tuple[int, ...]:
    """Token ids of a text.

    Args:
        tokenizer: Any; shared by threads or not.
        text: What to read.
        add_special_tokens: Whether the tokenizer puts its own around the text.
        split_special_tokens: Whether special tokens written out in the text stay text.
    """
    with _ONE_AT_A_TIME:
        encoded = tokenizer(
            text,
            add_special_tokens=add_special_tokens,
            split_special_tokens=split_special_tokens,
            verbose=False,
        )
    return tuple(encoded["input_ids"])
