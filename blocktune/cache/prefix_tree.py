"""Exact prefix caching: what the plain engines do, and the baseline that reuse is measured by.

A tree whose edges are whole pieces of a prompt (prefix, first chunk, second chunk, ...): a node's
state was computed after exactly the pieces on the path to it. Like SGLang's RadixAttention
(lookup along a path, locks while a request runs, eviction of unlocked leaves, least recently
used first), but by pieces, not pages: prompts here are cut at chunks anyway.

Exact states have a type of their own, `ExactKV`, which only `cut_exact` makes, from a cache that
declares to be exact: a chunk's relocated state is an approximation, and stored here it would
silently spoil every later answer with the same prefix.
"""

from __future__ import annotations

import hashlib
import itertools
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import InitVar, dataclass, field
from typing import NamedTuple

import torch

from blocktune.cache.chunk_kv import ChunkKV
from blocktune.cache.row_cache import RowCache

Piece = tuple[int, ...]
_FULL_PREFILL = object()


@dataclass(frozen=True, eq=False)
class ExactKV:
    """The state of one piece of a prompt, computed after exactly the tokens before it.

    Attributes:
        kv: Keys at their true positions: ``kv.origin`` is the number of tokens before it.
        context: Digest of those tokens, `context_digest`.

    Raises:
        ValueError: If made by anything but `cut_exact`.
    """

    kv: ChunkKV
    context: str
    proof: InitVar[object] = None

    def __post_init__(self, proof: object):
        if proof is not _FULL_PREFILL:
            raise ValueError(
                "only a full prefill makes exact states; cut them from its cache with `cut_exact`"
            )


def context_digest(pieces: Iterable[Sequence[int]]) -> str:
    """Digest of all tokens of ``pieces``, joined: where the cuts are does not count."""
    joined = [token for piece in pieces for token in piece]
    return hashlib.sha256(torch.tensor(joined, dtype=torch.int64).numpy().tobytes()).hexdigest()


def cut_exact(
    cache: RowCache, prompt: int, pieces: Sequence[Sequence[int]], fingerprint: str
) -> tuple[ExactKV, ...]:
    """Cuts the cache of a full prefill into pieces for the exact prefix cache.

    Args:
        cache: After the prefill. Its columns ``0, 1, ..`` hold the tokens of ``pieces`` in
            order, at positions equal to the columns.
        prompt: Index in the batch.
        pieces: Token ids of prefix, first chunk, second chunk and so on.
        fingerprint: Of the model that ran.

    Returns:
        One `ExactKV` for each piece that has tokens, in its own memory.

    Raises:
        ValueError: If approximate states were ever loaded into the cache, or it was not
            declared exact, or is shorter than the pieces.
    """
    if not cache.exact:
        raise ValueError(
            "this cache holds approximate states (reused chunks); "
            "they must never enter the exact prefix cache"
        )
    total = sum(map(len, pieces))
    if total > cache.num_columns:
        raise ValueError(f"the pieces have {total} tokens, the cache {cache.num_columns} columns")
    pieces = [piece for piece in pieces if len(piece)]
    layers = [layer for layer in cache.layers if layer.is_initialized]
    cuts, start = [], 0
    for index, piece in enumerate(pieces):
        span = slice(start, start + len(piece))
        kv = ChunkKV(
            keys=tuple(layer.keys[prompt, :, span] for layer in layers),
            values=tuple(layer.values[prompt, :, span] for layer in layers),
            token_ids=torch.tensor(piece, dtype=torch.int64),
            fingerprint=fingerprint,
            origin=start,
        )
        cuts.append(ExactKV(kv.compact(), context_digest(pieces[:index]), proof=_FULL_PREFILL))
        start = span.stop
    return tuple(cuts)


def load_exact(cache: RowCache, prompt: int, exact: ExactKV) -> None:
    """Writes a piece of an exact prefix into ``cache``, which stays as exact as it was.

    In an exact prefix the column is the position.
    """
    kv = exact.kv
    columns = slice(kv.origin, kv.origin + kv.num_tokens)
    for layer, (keys, values) in enumerate(zip(kv.keys, kv.values, strict=True)):
        own_keys, own_values = cache.room(layer, prompt, columns, keys, values, exact=True)
        own_keys.copy_(keys)
        own_values.copy_(values)


@dataclass(eq=False)
class _Node:
    parent: _Node | None = None
    piece: Piece = ()
    exact: ExactKV | None = None  # None in roots
    children: dict[Piece, _Node] = field(default_factory=dict)
    locks: int = 0
    used: int = 0


class PrefixStats(NamedTuple):
    """What the tree holds and did. ``declined``: pieces for which no room could be made."""

    num_bytes: int
    num_pieces: int
    hit_tokens: int
    missed_tokens: int
    evictions: int
    declined: int


class PrefixMatch:
    """The longest known prefix of a prompt, locked against eviction until the block ends.

    Attributes:
        exacts: States of the matched pieces, in order; together they hold ``num_tokens`` tokens,
            the prompt is computed from there on, and ``num_bytes`` bytes.
    """

    def __init__(self, tree: PrefixTree, path: list[_Node]):
        self._tree, self._path = tree, path
        self.exacts = tuple(node.exact for node in path)
        self.num_tokens = sum(exact.kv.num_tokens for exact in self.exacts)
        self.num_bytes = sum(exact.kv.num_bytes for exact in self.exacts)

    def load(self, cache: RowCache, prompt: int) -> None:
        """Puts the matched states into the first columns of one prompt of ``cache``."""
        for exact in self.exacts:
            load_exact(cache, prompt, exact)

    def release(self) -> None:
        """Lets the pieces be evicted again; leaving the ``with`` block calls it."""
        path, self._path = self._path, []
        self._tree._unlock(path)

    def __enter__(self) -> PrefixMatch:
        return self

    def __exit__(self, *exception) -> None:
        self.release()


class PrefixTree:
    """Exact states of prompt prefixes in ``max_bytes``, the least recently used first out."""

    def __init__(self, max_bytes: int = 4 << 30):
        if max_bytes <= 0:
            raise ValueError(f"a prefix cache needs memory; got {max_bytes} bytes")
        self.max_bytes = max_bytes
        self._roots: dict[tuple[str, str], _Node] = {}
        self._clock = itertools.count(1)
        self._lock = threading.RLock()
        self._bytes = self._hits = self._misses = self._evictions = self._declined = 0

    def match(
        self, fingerprint: str, pieces: Sequence[Sequence[int]], *, salt: str = ""
    ) -> PrefixMatch:
        """Finds the longest path of whole pieces; use it in a ``with`` block.

        Args:
            fingerprint: Of the model that runs; others' states are never seen.
            pieces: Token ids of prefix, first chunk, second chunk and so on.
            salt: Separates tenants that must not see each other's hits.
        """
        with self._lock:
            path, node = [], self._roots.get((fingerprint, salt))
            for piece in filter(len, pieces):
                node = node and node.children.get(tuple(piece))
                if node is None:
                    break
                path.append(node)
            self._touch(path)
            self._hits += sum(len(node.piece) for node in path)
            self._misses += sum(map(len, pieces)) - sum(len(node.piece) for node in path)
            return PrefixMatch(self, path)

    def insert(self, exacts: Sequence[ExactKV], *, salt: str = "") -> int:
        """Adds the pieces of a prompt, from its very first on; known ones stay as they are.

        Args:
            exacts: From `cut_exact`, in order, without gaps.
            salt: As in `match`.

        Returns:
            Pieces added: fewer than are new if no room can be made (`PrefixStats.declined`).

        Raises:
            ValueError: If a state is not exact, or not the continuation of those before it.
        """
        pieces = self._check(exacts)
        if not pieces:
            return 0
        with self._lock:
            root = self._roots.setdefault((exacts[0].kv.fingerprint, salt), _Node())
            node, path, added = root, [], 0
            for piece, exact in zip(pieces, exacts, strict=True):
                child = node.children.get(piece)
                if child is None and not self._make_room(exact.kv.num_bytes):
                    self._declined += len(pieces) - len(path)
                    break
                if child is None:
                    child = node.children[piece] = _Node(node, piece, exact)
                    self._bytes += exact.kv.num_bytes
                    added += 1
                self._touch([child])
                path.append(child)
                node = child
            self._unlock(path)
            return added

    def stats(self) -> PrefixStats:
        """Counters since the tree was made."""
        with self._lock:
            pieces = sum(1 for _ in self._nodes())
            counters = (self._hits, self._misses, self._evictions, self._declined)
            return PrefixStats(self._bytes, pieces, *counters)

    def _check(self, exacts: Sequence[ExactKV]) -> list[Piece]:
        pieces: list[Piece] = []
        for index, exact in enumerate(exacts):
            if not isinstance(exact, ExactKV):
                raise ValueError(
                    f"piece {index} is a {type(exact).__name__}, which may be approximate; "
                    "the prefix cache takes only `ExactKV` of a full prefill"
                )
            origin = (exact.context, exact.kv.fingerprint)
            if origin != (context_digest(pieces), exacts[0].kv.fingerprint):
                raise ValueError(f"piece {index} comes from another context or another model")
            pieces.append(tuple(exact.kv.token_ids.tolist()))
        return pieces

    def _make_room(self, num_bytes: int) -> bool:
        while self._bytes + num_bytes > self.max_bytes:
            leaves = [n for n in self._nodes() if not n.children and not n.locks]
            if num_bytes > self.max_bytes or not leaves:
                return False
            leaf = min(leaves, key=lambda node: node.used)
            del leaf.parent.children[leaf.piece]
            self._bytes -= leaf.exact.kv.num_bytes
            self._evictions += 1
        return True

    def _nodes(self) -> Iterator[_Node]:
        waiting = list(self._roots.values())
        while waiting:
            node = waiting.pop()
            waiting.extend(node.children.values())
            if node.exact is not None:
                yield node

    def _touch(self, path: list[_Node]) -> None:
        # A shared prefix is used whenever one of its continuations is: same time for the path.
        now = next(self._clock)
        for node in path:
            node.used = now
            node.locks += 1

    def _unlock(self, path: list[_Node]) -> None:
        with self._lock:
            for node in path:
                node.locks -= 1
