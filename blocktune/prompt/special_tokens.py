"""Text to token ids: user text never becomes special tokens; BOS occurs once, at the start."""

from __future__ import annotations

import re
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from contextvars import ContextVar
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase

Ids = tuple[int, ...]
T = TypeVar("T")

MOST_BYTES = 16 << 20  # of texts and their token ids that are remembered for one tokenizer

OWNER: ContextVar[str] = ContextVar("owner", default="")
"""Whose texts are tokenised: nobody is answered faster because somebody else sent the same text."""
_LOCK = threading.Lock()
"""``split_special_tokens`` is a state of a fast tokenizer that every call sets: a call of another
thread in between would change how the text is read."""


class _Recent:
    """Token ids by text and options, least recently used first; and facts of the tokenizer."""

    def __init__(self):
        self.ids: OrderedDict[tuple, Ids] = OrderedDict()
        self.num_bytes = 0
        self.numbers: dict[int, int] = {}  # one object for each token, not for each occurrence
        self.facts: dict[Hashable, Any] = {}

    def put(self, key: tuple, ids: Ids) -> None:
        self.ids[key] = ids
        self.num_bytes += _size(key, ids)
        while self.num_bytes > MOST_BYTES:
            self.num_bytes -= _size(*self.ids.popitem(last=False))


def _size(key: tuple, ids: Ids) -> int:
    """Bytes of a text and its ids, with what is around them: there may be many short ones."""
    return sys.getsizeof(key[1]) + 8 * len(ids) + 400


_RECENT: WeakKeyDictionary[PreTrainedTokenizerBase, _Recent] = WeakKeyDictionary()


def encode(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    add_special_tokens: bool = False,
    split_special_tokens: bool = False,
) -> Ids:
    """Token ids of a text; those of recent texts are remembered.

    Tokenising 16,000 tokens takes 20 ms, as long as everything else that a prompt of cached chunks
    needs on a GPU. Threads may share the tokenizer; tokens may be added to it, but not changed.
    ``add_special_tokens`` puts the tokenizer's own around the text; with ``split_special_tokens``
    those written out in the text stay text.
    """
    key = OWNER.get(), text, add_special_tokens, split_special_tokens, len(tokenizer)
    with _LOCK:
        recent = _RECENT.setdefault(tokenizer, _Recent())
        if key in recent.ids:
            recent.ids.move_to_end(key)
            return recent.ids[key]
        options = {"add_special_tokens": add_special_tokens, "verbose": False}
        encoded = tokenizer(text, split_special_tokens=split_special_tokens, **options)
        numbers = recent.numbers
        ids = tuple(numbers.setdefault(token, token) for token in encoded["input_ids"])
        recent.put(key, ids)
        return ids


def remembered(tokenizer: PreTrainedTokenizerBase, key: Hashable, make: Callable[[], T]) -> T:
    """What ``make`` says of a tokenizer; it is called once for each ``key``."""
    with _LOCK:
        facts = _RECENT.setdefault(tokenizer, _Recent()).facts
    if key not in facts:
        facts[key] = make()
    return facts[key]


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> Mapping[str, int]:
    """Ids of the special tokens by their text.

    Remembered, since tokenizers rebuild the list of added tokens each time; Gemma 3 has 6,000.
    """

    def read() -> Mapping[str, int]:
        added = tokenizer.added_tokens_decoder.items()
        return {token.content: index for index, token in added if token.special}

    return remembered(tokenizer, ("special", len(tokenizer)), read)


class UserText:
    """The texts of one prompt that pass through a chat template.

    A question that contains ``<|eot_id|>`` must not end the turn. A text with special tokens in it
    is replaced by a placeholder while the template renders, and tokenised separately; other texts
    are tokenised together with what surrounds them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self._replaced: dict[str, str] = {}

    def safe(self, text: str) -> str:
        """The text, or the placeholder for it."""
        if not any(token in text for token in special_tokens(self._tokenizer)):
            return text
        placeholder = f"BlocktuneText{len(self._replaced)}StandsHere"
        self._replaced[placeholder] = text
        return placeholder

    def encode(self, rendered: str) -> Ids:
        """Token ids of what the template rendered."""
        if not self._replaced:
            return encode(self._tokenizer, rendered)
        ids: Ids = ()
        for part in re.split(f"({'|'.join(self._replaced)})", rendered):
            text = self._replaced.get(part, part)
            ids += encode(self._tokenizer, text, split_special_tokens=part in self._replaced)
        return ids


def require_embedded(tokenizer: PreTrainedTokenizerBase, num_rows: int, *pieces: Ids) -> None:
    """Raises ValueError for a token whose id is not below ``num_rows``, those of the embedding."""
    last = max(max(piece, default=0) for piece in pieces)
    if last >= num_rows:
        raise ValueError(
            f"token {tokenizer.convert_ids_to_tokens(last)!r} has id {last}, and the model embeds "
            f"{num_rows} tokens; use the model's own tokenizer, or call "
            "model.resize_token_embeddings(len(tokenizer)) and train the new rows"
        )


def padding_id(tokenizer: PreTrainedTokenizerBase, num_rows: int) -> int:
    """The token of padding rows, which nothing sees: any that the model embeds will do."""
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in ids if token is not None and token < num_rows)


def with_bos(tokenizer: PreTrainedTokenizerBase, prefix: Ids) -> Ids:
    """Adds BOS where the template leaves it to the tokenizer, and to plain text."""
    bos = tokenizer.bos_token_id
    if bos is None or bos in prefix:
        return prefix
    adds = encode(tokenizer, "a", add_special_tokens=True)[0] == bos
    return (bos, *prefix) if adds or tokenizer.chat_template is None else prefix


def check_bos(tokenizer: PreTrainedTokenizerBase, prefix: Ids, *others: Ids) -> None:
    """Raises ValueError if BOS occurs anywhere but at the start of the prefix, or twice.

    Templates that open every turn with BOS (SmolLM2's ``<|im_start|>``) are left alone.
    """
    bos, template = tokenizer.bos_token_id, tokenizer.chat_template
    if bos is None or (template and tokenizer.bos_token in tokenizer.get_chat_template()):
        return
    count = sum(piece.count(bos) for piece in (prefix, *others))
    if count > 1 or (count == 1 and prefix[:1] != (bos,)):
        raise ValueError(
            f"the prompt holds the BOS token {tokenizer.bos_token!r} {count} times; it may only "
            "open the prompt: remove it from the instruction, the system text or the chat template"
        )
