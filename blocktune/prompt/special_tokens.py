"""Text to token ids: user text never becomes special tokens, and BOS stands once, at the start."""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Mapping
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase


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


def with_bos(tokenizer: PreTrainedTokenizerBase, prefix: tuple[int, ...]) -> tuple[int, ...]:
    """Adds BOS where the template leaves it to the tokenizer, and to plain text."""
    bos = tokenizer.bos_token_id
    if bos is None or bos in prefix:
        return prefix
    puts = encode(tokenizer, "a", add_special_tokens=True)[0] == bos
    return (bos, *prefix) if puts or tokenizer.chat_template is None else prefix


def check_bos(
    tokenizer: PreTrainedTokenizerBase, prefix: tuple[int, ...], *others: tuple[int, ...]
) -> None:
    """Raises ValueError if BOS stands anywhere but at the start of the prefix, or twice."""
    bos = tokenizer.bos_token_id
    if bos is None or _marks_turns(tokenizer):
        return
    count = sum(piece.count(bos) for piece in (prefix, *others))
    if count > 1 or (count == 1 and prefix[:1] != (bos,)):
        raise ValueError(
            f"the prompt holds the BOS token {tokenizer.bos_token!r} {count} times, it must open "
            f"the prompt and stand nowhere else; take it out of the instruction, the system text "
            f"or the chat template"
        )


def _marks_turns(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template opens every turn with BOS (SmolLM2's ``<|im_start|>``)."""
    return bool(tokenizer.chat_template) and tokenizer.bos_token in tokenizer.get_chat_template()


Ids = tuple[int, ...]

MOST_TOKENS = 1_000_000
"""Token ids that are remembered for one tokenizer: some 40 MB."""

_ONE_AT_A_TIME = threading.Lock()
"""Whether special tokens are split is a state of a fast tokenizer, set anew by every call: between
the setting and the reading of it another thread's call would change how this one's text is read."""


class _Recent:
    """Ids by text and rule, the longest unused forgotten first; and the special tokens."""

    def __init__(self):
        self.ids: OrderedDict[tuple, Ids] = OrderedDict()
        self.tokens = 0
        self.special: dict[int, Mapping[str, int]] = {}

    def get(self, key: tuple) -> Ids | None:
        if (found := self.ids.get(key)) is not None:
            self.ids.move_to_end(key)
        return found

    def put(self, key: tuple, ids: Ids) -> None:
        self.ids[key] = ids
        self.tokens += len(ids)
        while self.tokens > MOST_TOKENS:
            self.tokens -= len(self.ids.popitem(last=False)[1])


_RECENT: WeakKeyDictionary[PreTrainedTokenizerBase, _Recent] = WeakKeyDictionary()


def encode(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    add_special_tokens: bool = False,
    split_special_tokens: bool = False,
) -> Ids:
    """Token ids of a text.

    A chunk that comes again is not read again: to read 16,000 tokens takes 20 ms, as long as all
    else that cached chunks leave to do on a GPU.

    Args:
        tokenizer: Any; shared by threads or not. Its tokens may be added to, not changed.
        text: What to read.
        add_special_tokens: Whether the tokenizer puts its own around the text.
        split_special_tokens: Whether special tokens written out in the text stay text.
    """
    key = text, add_special_tokens, split_special_tokens, len(tokenizer)
    with _ONE_AT_A_TIME:
        recent = _RECENT.setdefault(tokenizer, _Recent())
        ids = recent.get(key)
        if ids is None:
            encoded = tokenizer(
                text,
                add_special_tokens=add_special_tokens,
                split_special_tokens=split_special_tokens,
                verbose=False,
            )
            ids = tuple(encoded["input_ids"])
            recent.put(key, ids)
    return ids


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> Mapping[str, int]:
    """Ids of the tokens that steer a model, by what they look like in text.

    Tokenizers list their added tokens anew each time; Gemma 3 has 6,000 of them.
    """
    with _ONE_AT_A_TIME:
        known = _RECENT.setdefault(tokenizer, _Recent()).special
        size = len(tokenizer)
        if size not in known:
            added = tokenizer.added_tokens_decoder.items()
            known[size] = {token.content: index for index, token in added if token.special}
        return known[size]
