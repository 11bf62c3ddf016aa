"""Text to token ids, from several threads at once; what was read lately is not read again."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase

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
