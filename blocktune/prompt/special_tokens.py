"""Tokenises text: user text never becomes special tokens, and BOS occurs once, at the start."""

from __future__ import annotations

import functools
import re
import sys
import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
from transformers import PreTrainedTokenizerBase

Ids = tuple[int, ...]
Fact = TypeVar("Fact", bound=Callable[[PreTrainedTokenizerBase], Any])

MOST_BYTES = 16 << 20  # most bytes of texts and token ids that are memoised for one tokenizer

OWNER: ContextVar[str] = ContextVar("owner", default="")
"""Owner of the texts. Memoised ids are not shared, so timing does not reveal others' texts."""
_LOCK = threading.Lock()
"""``split_special_tokens`` is state of a fast tokenizer that every call sets, so a concurrent call
would change how a text is tokenised."""


def int64(ids: Sequence[int]) -> np.ndarray:
    """Converts ids to an array, several times as fast as `numpy.array`."""
    return np.frombuffer(array("q", ids), np.int64) if ids else np.empty(0, np.int64)


class TokenIds(tuple):
    """Token ids of a memoised text, with values that every prompt needs, computed once."""

    @functools.cached_property
    def largest(self) -> int:
        """The largest id, or 0 if there are no ids."""
        return max(self, default=0)

    @functools.cached_property
    def array(self) -> np.ndarray:
        """The ids as a read-only int64 array."""
        return int64(self)

    @functools.cached_property
    def _hash(self) -> int:
        return super().__hash__()

    def __hash__(self):
        return self._hash


class _Recent:
    """LRU cache of token ids by text and options, and of facts about the tokenizer."""

    def __init__(self):
        self.ids: OrderedDict[tuple, Ids] = OrderedDict()
        self.num_bytes = 0
        self.numbers: dict[int, int] = {}  # interned ids: one object for each token
        self.facts: dict[Hashable, Any] = {}

    def get(self, key: tuple) -> TokenIds | None:
        if (ids := self.ids.get(key)) is not None:
            self.ids.move_to_end(key)
        return ids

    def put(self, key: tuple, ids: Sequence[int]) -> TokenIds:
        token_ids = TokenIds(self.numbers.setdefault(token, token) for token in ids)
        if key not in self.ids:  # another thread may have added it
            self.ids[key] = token_ids
            self.num_bytes += _size(key, token_ids)
        while self.num_bytes > MOST_BYTES:
            self.num_bytes -= _size(*self.ids.popitem(last=False))
        return token_ids


def _size(key: tuple, ids: Ids) -> int:
    """Bytes of a text and its ids, with the overhead, because there may be many short texts."""
    return sys.getsizeof(key[0]) + 16 * len(ids) + 500


_RECENT: WeakKeyDictionary[PreTrainedTokenizerBase, _Recent] = WeakKeyDictionary()


def encode(
    tokenizer: PreTrainedTokenizerBase, text: str, *, split_special_tokens: bool = False
) -> Ids:
    """Token ids of a text. See `encode_all`."""
    return encode_all(tokenizer, [text], split_special_tokens=split_special_tokens)[0]


def encode_all(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], *, split_special_tokens: bool = False
) -> list[Ids]:
    """Token ids of texts, without BOS and EOS; recent ones are memoised (20 ms for 16,000 tokens).

    Threads may share the tokenizer. Tokens may be added to it, but not changed. With
    ``split_special_tokens``, special tokens written in the text stay text.
    """
    how = OWNER.get(), split_special_tokens, len(tokenizer)
    options = {"split_special_tokens": split_special_tokens, "verbose": False}
    keys = [(text, how) for text in texts]
    with _LOCK:
        recent = _RECENT.setdefault(tokenizer, _Recent())
        results = [recent.get(key) for key in keys]
    for index in [index for index, ids in enumerate(results) if ids is None]:
        with _LOCK:  # for each text, so that other threads wait for one at most
            encoded = tokenizer(keys[index][0], add_special_tokens=False, **options)
            results[index] = recent.put(keys[index], encoded["input_ids"])
    return results


def remembered(*names: str) -> Callable[[Fact], Fact]:
    """Memoises a fact of a tokenizer until its tokens, or attributes of these names, change."""

    def wrapped(read: Fact) -> Fact:
        @functools.wraps(read)
        def recall(tokenizer: PreTrainedTokenizerBase) -> Any:
            key = read, len(tokenizer), *(str(getattr(tokenizer, name)) for name in names)
            with _LOCK:
                facts = _RECENT.setdefault(tokenizer, _Recent()).facts
            if key not in facts:
                facts[key] = read(tokenizer)
            return facts[key]

        return recall

    return wrapped


@remembered()
def special_tokens(tokenizer: PreTrainedTokenizerBase) -> Mapping[str, int]:
    """Ids of the special tokens, by their text.

    Memoised, because tokenizers rebuild the list of added tokens each time; Gemma 3 has 6,000.
    """
    added = tokenizer.added_tokens_decoder.items()
    return {token.content: index for index, token in added if token.special}


@remembered("chat_template")
def _controls(tokenizer: PreTrainedTokenizerBase) -> re.Pattern | None:
    """Where to cut texts so that no control token is left in them; None: nowhere.

    Control tokens are those of the chat template that a tokenizer does not call special (DeepSeek),
    so ``split_special_tokens`` does not split them. Cuts are after the first character.
    """
    template, added = str(tokenizer.chat_template or ""), tokenizer.added_tokens_decoder
    texts = [t.content for t in added.values() if not t.special and len(t.content) > 1]
    cuts = [f"(?<={re.escape(t[0])})(?={re.escape(t[1:])})" for t in texts if t in template]
    return re.compile("|".join(cuts)) if cuts else None


@remembered("bos_token_id")
def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    with _LOCK:
        return tokenizer("a", split_special_tokens=False)["input_ids"][0] == tokenizer.bos_token_id


def encode_user_texts(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> list[Ids]:
    """Token ids of passages or questions: control tokens written in them stay text."""
    texts, cuts = list(texts), _controls(tokenizer)
    whole = encode_all(tokenizer, texts, split_special_tokens=True)
    for index, text in enumerate(texts if cuts else ()):
        if len(parts := cuts.split(text)) > 1:
            encoded = encode_all(tokenizer, parts, split_special_tokens=True)
            whole[index] = TokenIds(token for ids in encoded for token in ids)
    return whole


class UserText:
    """User texts of one prompt that pass through a chat template.

    A text with special tokens, which must not end the turn, is replaced by a placeholder while the
    template renders, and tokenised separately; others together with their surroundings.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self._replaced: dict[str, str] = {}

    def safe(self, text: str) -> str:
        """The text itself, or a placeholder if it contains special or control tokens."""
        cuts, special = _controls(self._tokenizer), special_tokens(self._tokenizer)
        if not any(token in text for token in special) and not (cuts and cuts.search(text)):
            return text
        placeholder = f"BlocktuneText{len(self._replaced)}StandsHere"
        self._replaced[placeholder] = text
        return placeholder

    def encode(self, rendered: str) -> Ids:
        """Token ids of a rendered template, with the texts for the placeholders."""
        if not self._replaced:
            return encode(self._tokenizer, rendered)
        ids: Ids = ()
        for part in re.split(f"({'|'.join(self._replaced)})", rendered):
            if part in self._replaced:
                ids += encode_user_texts(self._tokenizer, [self._replaced[part]])[0]
            else:
                ids += encode(self._tokenizer, part)
        return ids


def require_embedded(tokenizer: PreTrainedTokenizerBase, num_rows: int, *pieces: Ids) -> None:
    """Raises ValueError for a token id beyond the ``num_rows`` of the embedding."""
    last = max(p.largest if isinstance(p, TokenIds) else max(p, default=0) for p in pieces)
    if last >= num_rows:
        raise ValueError(
            f"token {tokenizer.convert_ids_to_tokens(last)!r} has id {last}, but the model embeds "
            f"{num_rows} tokens; use its own tokenizer, or save it after resize_token_embeddings"
        )


def padding_id(tokenizer: PreTrainedTokenizerBase, num_rows: int) -> int:
    """Token of padding rows. Nothing sees it, so any token in the embedding will do."""
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in ids if token is not None and token < num_rows)


def with_bos(tokenizer: PreTrainedTokenizerBase, prefix: Ids) -> Ids:
    """Adds BOS to plain text, or if the template leaves it to the tokenizer."""
    bos = tokenizer.bos_token_id
    if bos is None or bos in prefix:
        return prefix
    added = tokenizer.chat_template is None or _adds_bos(tokenizer)
    return (bos, *prefix) if added else prefix


def check_bos(tokenizer: PreTrainedTokenizerBase, prefix: Ids, *others: Ids) -> None:
    """Raises ValueError if BOS occurs twice, or anywhere but at the start of the prefix.

    Templates that open every turn with BOS (SmolLM2's ``<|im_start|>``) are not checked.
    """
    bos, template = tokenizer.bos_token_id, tokenizer.chat_template
    if bos is None or (template and tokenizer.bos_token in tokenizer.get_chat_template()):
        return
    count = sum(piece.count(bos) for piece in (prefix, *others))
    if count > 1 or (count == 1 and prefix[:1] != (bos,)):
        raise ValueError(
            f"BOS ({tokenizer.bos_token!r}) occurs {count} times; it may only come first: remove "
            "it from the instruction, the system text or the chat template"
        )
