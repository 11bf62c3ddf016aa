"""Exact prefix caching: what the plain engines do, and the baseline that reuse is measured by.

A radix tree over tokens, as SGLang's RadixAttention: an edge holds the state of a run of tokens,
computed after exactly the tokens on the path to it, and is cut where a later prompt turns off it.
Paths are locked while a request reads them; leaves that nobody reads leave first, the least
recently used before the others. Recurrent layers have a state only at some depths, which
`checkpoints` chooses. Only exact states may enter, see `exact`.
"""

from __future__ import annotations

import heapq
import itertools
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from blocktune.cache.checkpoints import place_checkpoints
from blocktune.cache.exact import ExactKV, Ids, State, state_bytes
from blocktune.cache.row_cache import RowCache

_HISTORY = 256  # prompts whose shared depth is remembered, of each model and tenant


@dataclass(eq=False)
class _Node:
    parent: _Node | None = None
    exact: ExactKV | None = None  # None in roots
    state: State | None = None  # of recurrent layers, at the end of the run
    children: dict[int, _Node] = field(default_factory=dict)  # by their first token
    locks: int = 0
    used: int = 0
    overlaps: deque[int] = field(default_factory=lambda: deque(maxlen=_HISTORY))  # in roots

    @property
    def num_bytes(self) -> int:
        return self.exact.num_bytes + state_bytes(self.state)


class PrefixStats(NamedTuple):
    """What the tree holds and did, in tokens. ``declined``: those that no room was made for."""

    num_bytes: int
    num_tokens: int
    num_states: int
    hit_tokens: int
    missed_tokens: int
    evictions: int
    declined: int


class PrefixMatch:
    """The longest known prefix of a prompt, locked against eviction until the block ends.

    Attributes:
        num_tokens: Tokens whose state is known: the prompt is computed from there on.
        parts: Where it is: runs, and how many of their tokens.
        state: Of recurrent layers at this depth; None if the model has none, or at depth 0.
        overlap: Tokens in the tree: more than ``num_tokens`` if there is no recurrent state there.
    """

    def __init__(self, tree: PrefixTree, path: list[tuple[_Node, int]]):
        self._tree = tree
        self._last = path[-1][0] if path else None
        self.overlap = sum(count for _, count in path)
        while path and path[-1][0].exact.states is not None and not _resumes(*path[-1]):
            path = path[:-1]
        self.parts = tuple((node.exact, count) for node, count in path)
        self.num_tokens = sum(count for _, count in path)
        self.state = path[-1][0].state if path else None

    @property
    def num_bytes(self) -> int:
        """Bytes that are read to resume."""
        parts = ((e.num_bytes * count) // len(e.token_ids) for e, count in self.parts)
        return sum(parts) + state_bytes(self.state)

    def layers(self) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        """Keys and values of each layer that has any, run by run, ``(K, S, D)``."""
        for layer in range(len(self.parts[0][0].keys) if self.parts else 0):
            yield tuple(
                [getattr(exact, kind)[layer][:, :count] for exact, count in self.parts]
                for kind in ("keys", "values")
            )

    def load(self, cache: RowCache, prompt: int) -> None:
        """Puts the states into the first columns of one prompt of ``cache``, which stays exact."""
        for layer, pair in enumerate(self.layers()):
            at = 0
            for keys, values in zip(*pair, strict=True):
                columns = slice(at, at := at + keys.shape[1])
                room = cache.room(layer, prompt, columns, keys, values, exact=True)
                room[0].copy_(keys)
                room[1].copy_(values)

    def release(self) -> None:
        """Lets the runs be evicted again; leaving the ``with`` block calls it."""
        last, self._last = self._last, None
        self._tree._lock(last, -1)

    def __enter__(self) -> PrefixMatch:
        return self

    def __exit__(self, *exception) -> None:
        self.release()


def _resumes(node: _Node, count: int) -> bool:
    return node.state is not None and count == len(node.exact.token_ids)


class PrefixTree:
    """Exact states of prompt prefixes in ``max_bytes``, the least recently used first out.

    Args:
        max_bytes: Of all states together.
        checkpoints: States of recurrent layers kept along one prompt, at most.
    """

    def __init__(self, max_bytes: int = 4 << 30, checkpoints: int = 8):
        if max_bytes <= 0:
            raise ValueError(f"a prefix cache needs memory; got {max_bytes} bytes")
        self.max_bytes, self.checkpoints = max_bytes, checkpoints
        self._roots: dict[tuple[str, str], _Node] = {}
        self._clock = itertools.count(1)
        self._mutex = threading.RLock()
        self._bytes = self._hits = self._misses = self._evictions = self._declined = 0

    def match(self, fingerprint: str, token_ids: Sequence[int], *, salt: str = "") -> PrefixMatch:
        """Finds the longest known prefix; use it in a ``with`` block.

        Args:
            fingerprint: Of the model that runs; others' states are never seen.
            token_ids: Of the prompt, as far as it may be cached.
            salt: Separates tenants that must not see each other's hits.
        """
        with self._mutex:
            root = self._roots.get((fingerprint, salt), _Node())
            match = PrefixMatch(self, self._walk(root, tuple(token_ids)))
            self._lock(match._last, 1)
            root.overlaps.append(match.overlap)
            self._hits += match.num_tokens
            self._misses += len(token_ids) - match.num_tokens
            return match

    def checkpoints_for(
        self, fingerprint: str, num_tokens: int, ends: Iterable[int] = (), *, salt: str = ""
    ) -> tuple[int, ...]:
        """Depths at which to keep the recurrent states of a prompt of ``num_tokens`` tokens.

        They cost later prompts the fewest tokens if these are shared as deep as the last ones were,
        or up to one of ``ends``, where pieces of the prompt end.
        """
        with self._mutex:
            root = self._roots.get((fingerprint, salt), _Node())
            seen = [min(depth, num_tokens) for depth in root.overlaps]
        return place_checkpoints(Counter([*seen, *ends]), self.checkpoints)

    def insert(self, exact: ExactKV, *, salt: str = "") -> int:
        """Adds a run behind the tokens that are known; what is known stays as it is.

        Args:
            exact: From `cut_exact`.
            salt: As in `match`.

        Returns:
            Tokens added: fewer than are new if no room can be made (`PrefixStats.declined`), or
            if what was before them has left.

        Raises:
            ValueError: If the state is not exact.
        """
        if not isinstance(exact, ExactKV):
            raise ValueError(
                f"this is a {type(exact).__name__}, which may be approximate; "
                "the prefix cache takes only an `ExactKV` of a full prefill"
            )
        ids = exact.context + exact.token_ids
        with self._mutex:
            root = self._roots.setdefault((exact.fingerprint, salt), _Node())
            path = self._walk(root, ids)
            known = sum(count for _, count in path)
            if known < len(exact.context):
                self._declined += len(ids) - known
                return 0
            added = 0
            if known < len(ids):
                parent = self._cut(*path[-1]) if path else root
                added = self._add(parent, exact.cut(known - len(exact.context), len(ids)))
            for depth, state in sorted((exact.states or {}).items()):
                self._keep_state(root, ids[:depth], state)
            return added

    def stats(self) -> PrefixStats:
        """Counters since the tree was made."""
        with self._mutex:
            nodes = list(self._nodes())
            tokens = sum(len(node.exact.token_ids) for node in nodes)
            states = sum(node.state is not None for node in nodes)
            counters = (self._hits, self._misses, self._evictions, self._declined)
            return PrefixStats(self._bytes, tokens, states, *counters)

    def _walk(self, root: _Node, ids: Ids) -> list[tuple[_Node, int]]:
        """The nodes along ``ids``, each with how many of its tokens are those."""
        node, at, path = root, 0, []
        while at < len(ids) and (child := node.children.get(ids[at])) is not None:
            tokens = child.exact.token_ids
            count = _common(tokens, ids[at : at + len(tokens)])
            child.used = next(self._clock)
            path.append((child, count))
            if count < len(tokens):
                break
            node, at = child, at + count
        return path

    def _cut(self, node: _Node, at: int) -> _Node:
        """The node that ends after ``at`` of a node's tokens, made by cutting it if need be."""
        tokens = node.exact.token_ids
        if at == len(tokens):
            return node
        upper = _Node(node.parent, node.exact.cut(0, at), locks=node.locks, used=node.used)
        upper.children[tokens[at]] = node
        node.parent.children[tokens[0]] = upper
        node.parent, node.exact = upper, node.exact.cut(at, len(tokens))
        return upper

    def _add(self, parent: _Node, exact: ExactKV) -> int:
        self._lock(parent, 1)
        room = self._make_room(exact.num_bytes)
        self._lock(parent, -1)
        if not room:
            self._declined += len(exact.token_ids)
            return 0
        node = _Node(parent, exact, used=next(self._clock))
        parent.children[exact.token_ids[0]] = node
        self._bytes += node.num_bytes
        return len(exact.token_ids)

    def _keep_state(self, root: _Node, ids: Ids, state: State) -> None:
        path = self._walk(root, ids)
        if sum(count for _, count in path) < len(ids):
            return  # its tokens found no room
        node = self._cut(*path[-1])
        self._lock(node, 1)
        if node.state is None and self._make_room(state_bytes(state)):
            node.state = state
            self._bytes += state_bytes(state)
        self._lock(node, -1)

    def _make_room(self, num_bytes: int) -> bool:
        if num_bytes > self.max_bytes:
            return False
        if self._bytes + num_bytes <= self.max_bytes:
            return True
        leaves = [(n.used, id(n), n) for n in self._nodes() if not n.children and not n.locks]
        heapq.heapify(leaves)
        while leaves and self._bytes + num_bytes > self.max_bytes:
            *_, leaf = heapq.heappop(leaves)
            parent = leaf.parent
            del parent.children[leaf.exact.token_ids[0]]
            self._bytes -= leaf.num_bytes
            self._evictions += 1
            if parent.exact is not None and not parent.children and not parent.locks:
                heapq.heappush(leaves, (parent.used, id(parent), parent))
        self._roots = {
            key: root for key, root in self._roots.items() if root.children or root.locks
        }
        return self._bytes + num_bytes <= self.max_bytes

    def _nodes(self) -> Iterator[_Node]:
        waiting = list(self._roots.values())
        while waiting:
            node = waiting.pop()
            waiting.extend(node.children.values())
            if node.exact is not None:
                yield node

    def _lock(self, node: _Node | None, count: int) -> None:
        """Locks (or, by -1, unlocks) a node and all above it, which stay as long as it does."""
        with self._mutex:
            while node is not None:
                node.locks += count
                node = node.parent


def _common(left: Ids, right: Ids) -> int:
    """How many tokens two runs share from their first on."""
    if left[: len(right)] == right:
        return len(right)
    pairs = enumerate(zip(left, right, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(left), len(right)))
