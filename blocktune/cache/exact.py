"""Exact states of prompts, which only a full prefill can produce.

A chunk's relocated state would silently spoil every later answer with that prefix. So exact states
have their own type, `ExactKV`. Only `cut_exact`, from a cache marked as exact, and files make it.
Keys and values can be cut at any token; a prompt of a recurrent model resumes at a checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from blocktune.cache.chunk_kv import Entry, Read, State, compact, named, read_layers
from blocktune.cache.row_cache import RowCache

NO_IDS = torch.empty(0, dtype=torch.int64)


@dataclass(frozen=True, eq=False)
class ExactKV(Entry):
    """State of a run of consecutive prompt tokens, computed after exactly the tokens before it.

    ``states`` are recurrent states by depth (number of tokens before the state), the only places to
    resume at. None: no layer is recurrent. A file keeps the last state only.
    """

    kind: ClassVar[str] = "prefix"
    token_ids: Tensor  # the run, ``(S,)`` int64
    context: Tensor  # the tokens before the run, ``(C,)`` int64
    keys: tuple[Tensor, ...]  # of each layer that has any, ``(K, S, D)``, at their true positions
    values: tuple[Tensor, ...]
    fingerprint: str  # of the model that ran
    states: Mapping[int, State] | None = None

    @property
    def end(self) -> int:
        """Number of tokens up to the end of the run."""
        return len(self.context) + len(self.token_ids)

    def cut(self, start: int, stop: int) -> ExactKV:
        """Copies the tokens ``start`` to ``stop`` of the run, without context and states."""
        pair = (tuple(compact(t[:, start:stop]) for t in kind) for kind in (self.keys, self.values))
        ids, states = compact(self.token_ids[start:stop]), None if self.states is None else {}
        return ExactKV(ids, NO_IDS, *pair, self.fingerprint, states)

    def placed(self, context: Tensor, states: Mapping[int, State] | None) -> ExactKV:
        """The same run with another context and other recurrent states."""
        return replace(self, context=context, states=states)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield "context", self.context
        yield from named(self.keys, self.values)
        for index, state in enumerate((self.states or {}).get(self.end, ())):
            if state is not None:
                yield f"state.{index}", state

    def facts(self) -> dict[str, int]:
        """See `Entry.facts`. ``held`` has a bit for each state; -1: the model has no states."""
        last = (self.states or {}).get(self.end, ())
        bits = sum(1 << index for index, state in enumerate(last) if state is not None)
        held = -1 if self.states is None else bits
        return {"num_layers": len(self.keys), "num_states": len(last), "held": held}

    @classmethod
    def restore(cls, facts: Mapping, read: Read, token_ids: Tensor, fingerprint: str) -> Self:
        pair, bits = read_layers(facts, read), int(facts["held"])
        context, count = read("context"), int(facts["num_states"])
        last = tuple(read(f"state.{i}") if bits >> i & 1 else None for i in range(count))
        states = {len(context) + len(token_ids): last} if count else {}
        return cls(token_ids, context, *pair, fingerprint, None if bits < 0 else states)


def state_bytes(state: State | None) -> int:
    """Size of a recurrent state in bytes."""
    return sum(tensor.nbytes for tensor in state or () if tensor is not None)


def cut_exact(
    cache: Any,  # a `RowCache` or `PrefillCache` whose columns 0, 1, .. hold the tokens, in order
    prompt: int,  # index in the batch
    token_ids: Sequence[int],  # of the prompt, from its first token on
    fingerprint: str,  # of the model that ran
    *,
    start: int = 0,  # number of first tokens to leave out, because the tree has them
    states: Mapping[int, State] | None = None,  # of recurrent layers, by depth
) -> ExactKV:
    """Copies the cache of a full prefill. ValueError: it may be approximate."""
    if not cache.exact:
        raise ValueError("approximate states (reused chunks) never enter the exact prefix cache")
    layers = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
    span, ids = slice(start, len(token_ids)), torch.tensor(token_ids, dtype=torch.int64)
    keys = tuple(layer.keys[prompt, :, span].clone() for layer in layers)
    values = tuple(layer.values[prompt, :, span].clone() for layer in layers)
    return ExactKV(ids[span].clone(), ids[:start].clone(), keys, values, fingerprint, states)


@dataclass(frozen=True)
class PrefixMatch:
    """The longest cached prefix of a prompt."""

    parts: Sequence[tuple[ExactKV, int]]  # consecutive runs, and how many tokens of each match
    state: State | None  # of recurrent layers at the end of the prefix
    overlap: int  # matching tokens in the tree; the first ``num_tokens`` of them can be resumed
    disk_tokens: int  # how many of ``num_tokens`` were read from files

    @property
    def num_tokens(self) -> int:
        """Number of cached tokens; the prompt is computed from there on."""
        return sum(count for _, count in self.parts)

    @property
    def num_bytes(self) -> int:
        """Number of bytes read to resume."""
        parts = ((e.num_bytes * count) // len(e.token_ids) for e, count in self.parts)
        return sum(parts) + state_bytes(self.state)

    def layers(self) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        """Yields each layer's keys and values as lists of runs, ``(K, S, D)``."""
        for layer in range(len(self.parts[0][0].keys) if self.parts else 0):
            keys = [exact.keys[layer][:, :count] for exact, count in self.parts]
            yield keys, [exact.values[layer][:, :count] for exact, count in self.parts]

    def load(self, cache: RowCache, prompt: int) -> None:
        """Copies the states into the first columns of a prompt of ``cache``, which stays exact."""
        for layer, pair in enumerate(self.layers()):
            at = 0
            for states in zip(*pair, strict=True):
                columns = slice(at, at := at + states[0].shape[1])
                room = cache.room(layer, prompt, columns, *states, exact=True)
                room[0].copy_(states[0])
                room[1].copy_(states[1])


def place_checkpoints(weights: Mapping[int, int], budget: int) -> tuple[int, ...]:
    """Chooses at most ``budget`` of the depths, so that the fewest tokens are recomputed.

    ``weights`` say how often prompts were shared up to each. Source: arXiv:2605.05219.
    """
    kept = sorted(depth for depth, weight in weights.items() if depth > 0 and weight > 0)
    if budget >= len(kept) or budget < 1:
        return tuple(kept[: max(budget, 0)])
    depths, counts = np.array(kept), np.array([weights[depth] for depth in kept])
    prompts = np.concatenate(([0], counts.cumsum()))
    tokens = np.concatenate(([0], (counts * depths).cumsum()))
    # after[j, i]: tokens recomputed by the prompts of depths i to j - 1, resumed at depth i
    after = tokens[:, None] - tokens[:-1] - depths * (prompts[:, None] - prompts[:-1])
    after[~np.tri(*after.shape, k=-1, dtype=bool)] = tokens[-1] + 1  # none: more than any cost
    cost, chosen = tokens, []  # cost[j]: of the first j depths, without any checkpoint
    for _ in range(budget):
        total = after + cost[:-1]
        chosen.append(len(kept) - 1 - total[:, ::-1].argmin(axis=1))  # the deepest of equal ones
        cost = np.concatenate(([0], total[1:].min(axis=1)))
    placed, left = [], len(kept)
    for last in reversed(chosen):
        if left:
            left = last[left]
            placed.append(kept[left])
    return tuple(reversed(placed))
