"""Exact prefix caching, as other engines do it: the baseline that chunk reuse is compared with.

A radix tree over tokens, as in SGLang's RadixAttention. A node holds the state of a run of tokens,
computed after exactly those on the path to it, and is split where a later prompt diverges. Paths
are locked while a request reads them. Unlocked leaves are evicted, the least recently used first,
to files of the chunk store if it has a folder.
"""

from __future__ import annotations

import heapq
import itertools
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from blocktune.cache.chunk_kv import State
from blocktune.cache.exact import NO_IDS, ExactKV, PrefixMatch, place_checkpoints, state_bytes
from blocktune.cache.store.chunk_store import ChunkStore
from blocktune.cache.store.config import keep_latest
from blocktune.cache.store.fingerprint import chunk_key

_TENANTS = 1 << 16  # fingerprints whose files are known to be in the tree
_HISTORY = 256  # prompts of a model and tenant whose shared depth is remembered
_NODES, _TOKENS = 1 << 12, 1 << 22  # most runs, and tokens, that are known but in files only


@dataclass(eq=False)
class _Node:
    parent: _Node | None = None
    ids: np.ndarray = field(default_factory=NO_IDS.numpy)
    exact: ExactKV | None = None  # the run, without its context; None: in a file only, or a root
    state: State | None = None  # of recurrent layers, at the end of the run
    children: dict[int, _Node] = field(default_factory=dict)  # by their first token
    locks: int = 0
    used: int = 0
    key: str = ""  # of its file, if any; the run may be in memory as well
    overlaps: deque[int] = field(default_factory=lambda: deque(maxlen=_HISTORY))  # roots only

    @property
    def num_bytes(self) -> int:
        return self.exact.num_bytes + state_bytes(self.state)

    @property
    def is_leaf(self) -> bool:
        """Whether it can be evicted: it is in memory and unlocked, and no child is in memory."""
        children = self.children.values()
        return self.exact is not None and not self.locks and all(c.exact is None for c in children)


_Path = list[tuple[_Node, int]]  # consecutive nodes, with the number of tokens that match


class PrefixStats(NamedTuple):
    """Content of the tree, and counters since it was created, mostly of tokens."""

    num_bytes: int
    num_tokens: int
    num_states: int
    hit_tokens: int = 0
    missed_tokens: int = 0
    evictions: int = 0
    declined: int = 0  # tokens that were not added
    disk_tokens: int = 0  # in files only
    disk_hit_tokens: int = 0  # part of ``hit_tokens`` that was read from files


class PrefixTree:
    """LRU cache of exact states of prompt prefixes, at most ``max_bytes`` in memory."""

    def __init__(
        self,
        max_bytes: int = 4 << 30,
        checkpoints: int = 8,  # most recurrent states kept along one prompt
        store: ChunkStore | None = None,  # its folder, if any, gets the runs evicted from memory
    ):
        if max_bytes <= 0:
            raise ValueError(f"a prefix cache needs memory; got {max_bytes} bytes")
        self.max_bytes, self.checkpoints = max_bytes, checkpoints
        self._store = None if store is None or store.folder is None else store
        self._roots: dict[str, _Node] = {}  # by fingerprint, which differs between tenants
        self._listed: dict[str, None] = {}  # fingerprints whose files are in the tree
        self._payers: dict[str, str] = {}  # by fingerprint: tenant whose quota its files count for
        self._lists_files = self._store is not None
        self._clock = itertools.count(1)
        self._mutex = threading.RLock()
        self._counts, self._bytes = Counter(), 0

    def charge(self, fingerprint: str, tenant: str) -> None:
        """Counts the files of a fingerprint against the quota of a tenant."""
        with self._mutex:
            keep_latest(self._payers, fingerprint, tenant, _TENANTS)

    @contextmanager
    def match(self, fingerprint: str, token_ids: Sequence[int]) -> Iterator[PrefixMatch]:
        """Finds a model's longest cached prefix of a prompt, locked inside the block."""
        ids = np.asarray(token_ids, dtype=np.int64)
        with self._mutex:
            root = self._root(fingerprint)
            walked = self._walk(root, ids)
            in_files = {node for node, _ in walked if node.exact is None}
            path = self._loaded(walked, fingerprint)
            last, overlap = path[-1][0] if path else None, sum(count for _, count in path)
            while path and not _resumes(*path[-1]):
                path = path[:-1]
            parts = [(node.exact, count) for node, count in path]
            disk_tokens = sum(count for node, count in path if node in in_files)
            state = path[-1][0].state if path else None
            match = PrefixMatch(parts, state, overlap, disk_tokens)
            self._lock(last, 1)
            root.overlaps.append(overlap)
            self._counts["hit_tokens"] += match.num_tokens
            self._counts["disk_hit_tokens"] += match.disk_tokens
            self._counts["missed_tokens"] += len(ids) - match.num_tokens
        try:
            yield match
        finally:
            self._lock(last, -1)

    def checkpoints_for(
        self, fingerprint: str, num_tokens: int, ends: Iterable[int] = ()
    ) -> tuple[int, ...]:
        """Depths of the recurrent states to keep, by recent overlaps and the ``ends`` of pieces."""
        with self._mutex:
            root = self._roots.get(fingerprint, _Node())
            seen = [min(depth, num_tokens) for depth in root.overlaps]
        return place_checkpoints(Counter([*seen, *ends]), self.checkpoints)

    def insert(self, exact: ExactKV) -> int:
        """Adds a run from `cut_exact`; known tokens stay. Returns how many were added.

        It is 0 if they do not fit, or the tokens before them have been evicted.
        """
        ids = torch.cat((exact.context, exact.token_ids)).numpy()
        with self._mutex:
            root = self._roots[exact.fingerprint] = self._root(exact.fingerprint)
            path = self._loaded(self._walk(root, ids), exact.fingerprint)
            matched = sum(count for _, count in path)
            added = len(ids) - matched
            if matched < len(exact.context):
                self._counts["declined"] += added
                return 0
            if added:
                parent = self._split(*path[-1]) if path else root
                run = exact.cut(matched - len(exact.context), len(exact.token_ids))
                node = _Node(parent, run.token_ids.numpy(), run, used=next(self._clock))
                if self._make_room(node.num_bytes, parent):
                    parent.children[int(node.ids[0])] = node
                    self._bytes += node.num_bytes
                else:
                    self._counts["declined"] += added
                    added = 0
            for depth, state in sorted((exact.states or {}).items()):
                self._keep_state(root, ids[:depth], exact.fingerprint, state)
            return added

    def clear(self) -> None:
        """Empties the tree. Its files stay, but only other trees will find them."""
        with self._mutex:
            self._roots, self._bytes, self._lists_files = {}, 0, False

    def stats(self) -> PrefixStats:
        """See `PrefixStats`."""
        with self._mutex:
            nodes = list(self._nodes())
            tokens = sum(len(node.ids) for node in nodes if node.exact is not None)
            states = sum(node.state is not None for node in nodes)
            on_disk = sum(len(node.ids) for node in nodes) - tokens
            return PrefixStats(self._bytes, tokens, states, disk_tokens=on_disk, **self._counts)

    def _root(self, fingerprint: str) -> _Node:
        root = self._roots.get(fingerprint) or _Node()
        if self._lists_files and fingerprint not in self._listed:
            keep_latest(self._listed, fingerprint, None, _TENANTS)
            runs = []
            for file in self._store.files(ExactKV, fingerprint):
                with suppress(OSError, ValueError):  # damaged or out of reach: skip it
                    runs.append((file.read("context"), file.token_ids, file.key))
            for context, ids, key in sorted(runs, key=lambda run: (len(run[0]), len(run[1]))):
                path = self._walk(root, torch.cat((context, ids)).numpy())
                last, count = path[-1] if path else (root, 0)
                # Keep only runs that start exactly where another file's run ends.
                if sum(count for _, count in path) == len(context) and count == len(last.ids):
                    last.children[int(ids[0])] = _Node(last, ids.numpy(), key=key)
                    self._roots[fingerprint] = root
        return root

    def _walk(self, root: _Node, ids: np.ndarray) -> _Path:
        """The nodes along ``ids``."""
        node, at, path = root, 0, []
        while at < len(ids) and (child := node.children.get(int(ids[at]))) is not None:
            rest = ids[at : at + len(child.ids)]
            differ = np.flatnonzero(child.ids[: len(rest)] != rest)
            count = int(differ[0]) if len(differ) else len(rest)
            child.used = next(self._clock)
            path.append((child, count))
            if count < len(child.ids):
                break
            node, at = child, at + count
        return path

    def _loaded(self, path: _Path, fingerprint: str) -> _Path:
        """Loads a path into memory as far as possible. Returns that part."""
        for index, (node, _) in enumerate(path):
            if node.exact is None and not self._read(node, path[-1][0], fingerprint):
                return path[:index]
        return path

    def _read(self, node: _Node, last: _Node, fingerprint: str) -> bool:
        """Reads a run on the path to ``last``. If its file is gone, drops the node's subtree."""
        ids = torch.from_numpy(node.ids)
        exact = self._store.lookup(node.key, ids, fingerprint, ExactKV, keep=False).kv
        if exact is None:
            del node.parent.children[int(node.ids[0])]
            return False
        state = (exact.states or {}).get(exact.end)
        bare = exact.placed(NO_IDS, None if exact.states is None else {})
        if not self._make_room(bare.num_bytes + state_bytes(state), last):
            return False
        node.exact, node.state = bare, state
        self._bytes += node.num_bytes
        return True

    def _write(self, node: _Node) -> bool:
        """Writes a run to a file, unless it has one. Returns whether the file exists."""
        if self._store is None:
            return False
        if not node.key or node.key not in self._store:  # the store may have evicted it
            context, above = NO_IDS, node
            while (above := above.parent).parent is not None:
                context = torch.cat((torch.from_numpy(above.ids), context))
            ids, states = torch.cat((context, node.exact.token_ids)), node.exact.states
            if node.state is not None:
                states = {len(ids): node.state}
            exact = node.exact.placed(context, states)
            node.key = chunk_key(exact.fingerprint, ids, {"exact": "", "start": len(context)})
            payer = self._payers.get(exact.fingerprint, "")
            self._store.put(node.key, exact, tenant=payer, keep=False)
        return node.key in self._store

    def _forget_file(self, node: _Node) -> None:
        if node.key:
            self._store.discard(node.key)
            node.key = ""

    def _split(self, node: _Node, at: int) -> _Node:
        """Splits a node after ``at`` tokens, if it is longer. Returns the node that ends there."""
        if at == len(node.ids):
            return node
        self._forget_file(node)
        first, last = node.exact.cut(0, at), node.exact.cut(at, len(node.ids))
        upper = _Node(node.parent, node.ids[:at], first, locks=node.locks, used=node.used)
        upper.children[int(node.ids[at])] = node
        node.parent.children[int(node.ids[0])] = upper
        node.parent, node.ids, node.exact = upper, node.ids[at:], last
        return upper

    def _keep_state(self, root: _Node, ids: np.ndarray, fingerprint: str, state: State) -> None:
        path = self._loaded(self._walk(root, ids), fingerprint)
        if sum(count for _, count in path) < len(ids):
            return  # its tokens did not fit
        node = self._split(*path[-1])
        if node.state is None and self._make_room(state_bytes(state), node):
            self._forget_file(node)
            node.state = state
            self._bytes += state_bytes(state)

    def _make_room(self, num_bytes: int, beside: _Node) -> bool:
        """Evicts leaves until ``num_bytes`` fit, but not ``beside`` or a node above it."""
        if num_bytes > self.max_bytes or self._bytes + num_bytes <= self.max_bytes:
            return num_bytes <= self.max_bytes
        self._lock(beside, 1)
        nodes = list(self._nodes())
        self._forget_oldest([node for node in nodes if node.exact is None])
        leaves = [(node.used, id(node), node) for node in nodes if node.is_leaf]
        heapq.heapify(leaves)
        while leaves and self._bytes + num_bytes > self.max_bytes:
            *_, leaf = heapq.heappop(leaves)
            parent = leaf.parent
            self._bytes -= leaf.num_bytes
            self._counts["evictions"] += 1
            if self._write(leaf):
                leaf.exact = leaf.state = None
            else:
                del parent.children[int(leaf.ids[0])]
            if parent.is_leaf:
                heapq.heappush(leaves, (parent.used, id(parent), parent))
        self._roots = {k: root for k, root in self._roots.items() if root.children or root.locks}
        self._lock(beside, -1)
        return self._bytes + num_bytes <= self.max_bytes

    def _forget_oldest(self, stored: Sequence[_Node]) -> None:
        """Drops runs that are in files only, if there are too many. The store evicts the files."""
        left, tokens = len(stored), sum(len(node.ids) for node in stored)
        excess = left > _NODES or tokens > _TOKENS
        for node in sorted(stored, key=lambda node: node.used) if excess else ():
            many = left > _NODES // 2 or tokens > _TOKENS // 2
            if many and not node.children and not node.locks:
                del node.parent.children[int(node.ids[0])]
                left, tokens = left - 1, tokens - len(node.ids)

    def _nodes(self) -> Iterator[_Node]:
        waiting = list(self._roots.values())
        while waiting:
            node = waiting.pop()
            waiting.extend(node.children.values())
            if node.parent is not None:
                yield node

    def _lock(self, node: _Node | None, count: int) -> None:
        """Locks (``count`` 1) or unlocks (-1) a node and all nodes above it."""
        with self._mutex:
            while node is not None:
                node.locks += count
                node = node.parent


def _resumes(node: _Node, count: int) -> bool:
    return node.exact.states is None or (node.state is not None and count == len(node.ids))
