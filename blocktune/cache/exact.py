"""Exact states of prompts: a type that only a full prefill makes.

A chunk's relocated state is an approximation. Stored as the state of a prefix it would silently
spoil every later answer with the same prefix, so exact states have a type of their own, `ExactKV`,
which only `cut_exact` makes, from a cache that declares to be exact, and a file of that kind.

Keys and values can be cut at any token; a recurrent state cannot: what a later prompt shares up to
depth ``d`` is computed again from the deepest checkpoint at or before ``d``. Which ``M`` depths to
keep is decided by the depths up to which earlier prompts were shared.
Source: sparse prefix caching, arXiv:2605.05219, a dynamic programme of O(N M) steps.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import InitVar, dataclass, replace
from itertools import accumulate
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from blocktune.cache.chunk_kv import Entry, Read, State, own
from blocktune.cache.fingerprint import chunk_key
from blocktune.cache.row_cache import RowCache
from blocktune.cache.store import ChunkStore

_FULL_PREFILL = object()


@dataclass(frozen=True, eq=False)
class ExactKV(Entry):
    """The state of a run of a prompt's tokens, computed after exactly the tokens before it.

    ``states`` are of recurrent layers, at some depths (tokens before the state) from the end of
    ``context`` to the end of the run: only there can a prompt be resumed. None: the model has no
    recurrent layer, and resumes anywhere. A file keeps that at the end only.
    """

    kind: ClassVar[str] = "prefix"
    token_ids: Tensor  # the run, ``(S,)`` int64
    context: Tensor  # the tokens before it, likewise
    keys: tuple[Tensor, ...]  # of each layer that has any, ``(K, S, D)``, at their true positions
    values: tuple[Tensor, ...]
    fingerprint: str  # of the model that ran
    states: Mapping[int, State] | None = None
    proof: InitVar[object] = None

    def __post_init__(self, proof: object):
        if proof is not _FULL_PREFILL:
            raise ValueError(
                "only a full prefill makes exact states; cut them from its cache with `cut_exact`"
            )

    @property
    def end(self) -> int:
        """Tokens up to the end of the run."""
        return len(self.context) + len(self.token_ids)

    def cut(self, start: int, stop: int) -> ExactKV:
        """The tokens ``start`` to ``stop`` of the run, without states, in new memory."""
        return ExactKV(
            own(self.token_ids[start:stop]),
            torch.cat((self.context, self.token_ids[:start])),
            *(tuple(own(t[:, start:stop]) for t in kind) for kind in (self.keys, self.values)),
            self.fingerprint,
            None if self.states is None else {},
            proof=_FULL_PREFILL,
        )

    def placed(self, context: Tensor, states: Mapping[int, State] | None) -> ExactKV:
        """The same run, with what is said of the tokens before it and of recurrent states."""
        return replace(self, context=context, states=states, proof=_FULL_PREFILL)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield "context", self.context
        for layer, (key, value) in enumerate(zip(self.keys, self.values, strict=True)):
            yield f"key.{layer}", key
            yield f"value.{layer}", value
        for index, state in enumerate((self.states or {}).get(self.end, ())):
            if state is not None:
                yield f"state.{index}", state

    def facts(self) -> dict[str, int]:
        """See `Entry.facts`; ``held`` has a bit for each state, -1: the model has none."""
        last = (self.states or {}).get(self.end, ())
        held = sum(1 << index for index, state in enumerate(last) if state is not None)
        recurrent = {"num_states": len(last), "held": -1 if self.states is None else held}
        return {"num_layers": len(self.keys)} | recurrent

    @classmethod
    def restore(cls, facts: Mapping, read: Read, token_ids: Tensor, fingerprint: str) -> Self:
        layers, held = range(int(facts["num_layers"])), int(facts["held"])
        pair = (tuple(read(f"{n}.{layer}") for layer in layers) for n in ("key", "value"))
        context, count = read("context"), int(facts["num_states"])
        last = tuple(read(f"state.{i}") if held >> i & 1 else None for i in range(count))
        states = {len(context) + len(token_ids): last} if count else {}
        states = None if held < 0 else states
        return cls(token_ids, context, *pair, fingerprint, states, proof=_FULL_PREFILL)


def state_bytes(state: State | None) -> int:
    """Bytes of a recurrent state."""
    return sum(tensor.nbytes for tensor in state or () if tensor is not None)


def cut_exact(
    cache: Any,
    prompt: int,
    token_ids: Sequence[int],
    fingerprint: str,
    *,
    start: int = 0,
    states: Mapping[int, State] | None = None,
) -> ExactKV:
    """Copies what the exact prefix cache may keep from the cache of a full prefill.

    Args:
        cache: A `RowCache` or `PrefillCache` after the prefill. Its columns ``0, 1, ..`` hold
            ``token_ids``, at positions equal to the columns.
        prompt: Index in the batch.
        token_ids: Tokens of the prompt, from its first on.
        fingerprint: Of the model that ran.
        start: Tokens that are left out, since the tree has them.
        states: Of recurrent layers, by depth.

    Raises:
        ValueError: If approximate states were ever loaded into the cache, or it was not
            declared exact, or is shorter than the tokens.
    """
    if not cache.exact:
        raise ValueError(
            "this cache holds approximate states (reused chunks); "
            "they must never enter the exact prefix cache"
        )
    if len(token_ids) > cache.num_columns:
        raise ValueError(f"{len(token_ids)} tokens, but the cache has {cache.num_columns} columns")
    layers = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
    span, ids = slice(start, len(token_ids)), torch.tensor(token_ids, dtype=torch.int64)
    return ExactKV(
        ids[span].clone(),
        ids[:start].clone(),
        tuple(layer.keys[prompt, :, span].clone() for layer in layers),
        tuple(layer.values[prompt, :, span].clone() for layer in layers),
        fingerprint,
        states,
        proof=_FULL_PREFILL,
    )


class PrefixMatch:
    """The longest known prefix of a prompt, locked against eviction until the block ends."""

    def __init__(
        self,
        parts: Sequence[tuple[ExactKV, int]],  # where it is: runs, and how many of their tokens
        state: State | None,  # of recurrent layers at this depth
        overlap: int,  # tokens in the tree: more than ``num_tokens`` if there is no state there
        disk_tokens: int,  # those of ``num_tokens`` that were read from files
        release: Callable[[], None],
    ):
        self.parts, self.state, self.overlap = tuple(parts), state, overlap
        self.disk_tokens, self._release = disk_tokens, release

    @property
    def num_tokens(self) -> int:
        """Tokens whose state is known: the prompt is computed from there on."""
        return sum(count for _, count in self.parts)

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
        release, self._release = self._release, lambda: None
        release()

    def __enter__(self) -> PrefixMatch:
        return self

    def __exit__(self, *exception) -> None:
        self.release()


class PrefixFiles:
    """Runs of exact states in the folder of a store, by the tokens up to their end."""

    def __init__(self, store: ChunkStore):
        """In a store that has a folder."""
        self.store = store

    def find(self, fingerprint: str, salt: str) -> list[tuple[Tensor, Tensor, str]]:
        """Context, tokens and key of each run, those of short contexts first."""
        found = []
        for file in self.store.files(ExactKV, fingerprint, tenant=_tag(salt)):
            with suppress(ValueError):  # damaged: an answer without it
                found.append((file.read("context"), file.token_ids, file.key))
        return sorted(found, key=lambda one: (len(one[0]), len(one[1])))

    def read(self, key: str, ids: Tensor, fingerprint: str) -> ExactKV | None:
        """A run, verified, or None if it is gone."""
        return self.store.lookup(key, ids, fingerprint, ExactKV, keep=False).kv

    def write(self, exact: ExactKV, salt: str) -> str:
        """Keeps a run; its key, empty if the folder cannot keep it."""
        ids = torch.cat((exact.context, exact.token_ids))
        encoding = {"exact": salt, "start": len(exact.context)}
        key = chunk_key(exact.fingerprint, ids, encoding)
        self.store.put(key, exact, tenant=_tag(salt), keep=False)
        return key if self.has(key) else ""

    def has(self, key: str) -> bool:
        """Whether a run is still there."""
        return bool(key) and key in self.store

    def remove(self, key: str) -> None:
        """Drops a run."""
        self.store.discard(key)


def _tag(salt: str) -> str:
    """Tells name spaces apart in a folder, and does not say their salt."""
    return hashlib.sha256(salt.encode()).hexdigest()[:12] if salt else ""


def place_checkpoints(weights: Mapping[int, int], budget: int) -> tuple[int, ...]:
    """The depths, at most ``budget``, from which the fewest tokens are computed again.

    Only depths that occur are candidates: a checkpoint between two of them is never better than at
    the next one. With the last checkpoint at depth ``i``, the cost up to depth ``j`` is a line in
    the number of prompts before ``j`` whose slope is ``-i``; both only grow, so that the lowest
    line of each ``j`` is found in constant time on average.

    Args:
        weights: How often prompts were shared up to each depth (in tokens).
        budget: Checkpoints to place.

    Returns:
        Rising depths. Deterministic: of equal placements, one.
    """
    depths = sorted(depth for depth, weight in weights.items() if depth > 0 and weight > 0)
    count = len(depths)
    if budget >= count or budget < 1:
        return tuple(depths[: max(budget, 0)])
    before = [0, *accumulate(weights[depth] for depth in depths)]
    tokens = [0, *accumulate(weights[depth] * depth for depth in depths)]
    cost, last = tokens, []  # cost[j] of the first j depths, without any checkpoint
    for _ in range(budget):
        cost, chosen = _one_more(cost, depths, before, tokens)
        last.append(chosen)
    placed, j = [], count
    for chosen in reversed(last):
        j = chosen[j]
        if j is None:
            break
        placed.append(depths[j])
    return tuple(reversed(placed))


def _one_more(cost: list, depths: list, before: list, tokens: list) -> tuple[list, list]:
    """Costs with one checkpoint more, and at which depth's index it is the last (None: nowhere)."""
    lines: deque[tuple[int, int, int]] = deque()  # slope, intercept, index; falling slopes
    made, chosen = [0], [None]
    for j in range(1, len(before)):
        i = j - 1
        slope = -depths[i]
        line = (slope, cost[i] - tokens[i] - slope * before[i], i)
        while len(lines) > 1 and _hidden(lines[-2], lines[-1], line):
            lines.pop()
        lines.append(line)
        x = before[j]
        while len(lines) > 1 and lines[1][0] * x + lines[1][1] <= lines[0][0] * x + lines[0][1]:
            lines.popleft()
        slope, intercept, index = lines[0]
        made.append(tokens[j] + slope * x + intercept)
        chosen.append(index)
    return made, chosen


def _hidden(first: tuple, middle: tuple, last: tuple) -> bool:
    """Whether the middle one of three lines of falling slope is nowhere the lowest."""
    return (last[1] - first[1]) * (first[0] - middle[0]) <= (middle[1] - first[1]) * (
        first[0] - last[0]
    )
