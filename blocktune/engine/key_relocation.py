"""Moving cached pieces to where they stand in a prompt, layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from blocktune.cache import ChunkKV, RowCache
from blocktune.positions import RopeSpec, Rotation, rotate_keys


def relocator(
    cache: RowCache, prompt: int, kvs: list[ChunkKV], columns: Tensor, positions: Tensor, rope
) -> Callable[[int], None]:
    """Moves one prompt's pieces to ``positions`` ``(S,)`` and into ``columns``, layer by layer."""
    encoded_at = torch.cat([torch.arange(kv.num_tokens) + kv.origin for kv in kvs])
    shift = positions - encoded_at.to(positions.device)
    turns = _Rotations(shift, rope) if bool(shift.any()) else None
    runs = _segments(kvs, columns)

    def fill(layer: int) -> None:
        for run in runs:
            keys, values = (joined.to(columns.device) for joined in run.states(layer))
            own_keys, own_values = cache.room(layer, prompt, run.columns, keys, values)
            own_values.copy_(values)
            if turns is None:
                own_keys.copy_(keys)
            else:
                rotate_keys(keys, turns.of(layer).cut(run.tokens), own_keys)

    return fill


class _Segment(NamedTuple):
    """Pieces that stand side by side: their tokens among all cached ones, and their columns."""

    kvs: list[ChunkKV]
    tokens: slice
    columns: slice

    def states(self, layer: int) -> tuple[Tensor, Tensor]:
        """Their keys and values, ``(K, S, D)``."""
        keys = [kv.keys[layer] for kv in self.kvs]
        values = [kv.values[layer] for kv in self.kvs]
        return (
            (keys[0], values[0]) if len(keys) == 1 else (torch.cat(keys, 1), torch.cat(values, 1))
        )


def _segments(kvs: list[ChunkKV], columns: Tensor) -> list[_Segment]:
    """One piece a run on the CPU, where it fits into a core's cache; few large runs on CUDA."""
    runs: list[_Segment] = []
    ends = list(accumulate(kv.num_tokens for kv in kvs))
    first = columns[[end - kv.num_tokens for end, kv in zip(ends, kvs, strict=True)]].tolist()
    for kv, end, column in zip(kvs, ends, first, strict=True):
        tokens, span = slice(end - kv.num_tokens, end), slice(column, column + kv.num_tokens)
        last = runs[-1] if runs else None
        if columns.is_cuda and last is not None and last.columns.stop == column:
            tokens = slice(last.tokens.start, end)
            span = slice(last.columns.start, span.stop)
            runs[-1] = _Segment([*last.kvs, kv], tokens, span)
        else:
            runs.append(_Segment([kv], tokens, span))
    return runs


class _Rotations:
    """Rotations by layer; layers that share their frequencies share the rotation."""

    def __init__(self, shift: Tensor, rope: RopeSpec):
        self.shift, self.rope = shift, rope
        self._made: dict[tuple[float, ...], Rotation] = {}
        self._keys = [tuple(freq.tolist()) for freq in rope.inv_freq]

    def of(self, layer: int) -> Rotation:
        """Axes ``(1, S, R / 2)``."""
        key = self._keys[layer]
        if key not in self._made:
            turn = Rotation.of(self.shift[None], self.rope.inv_freq[layer])
            self._made[key] = Rotation(turn.cos[0], turn.sin[0])
        return self._made[key]
