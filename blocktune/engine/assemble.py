"""From examples to a cache that holds everything a method does not compute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from blocktune.cache import ChunkKV, ChunkStates, PrefixTree, RowCache
from blocktune.engine.account import Stopwatch
from blocktune.engine.encode import Encoder, Piece
from blocktune.layout import GLOBAL, Kind, Layout
from blocktune.positions import RopeSpec, Turn, turn_keys
from blocktune.prompt import Batch, Pieces


@dataclass
class Assembled:
    """A batch whose cache is filled as far as a method's caches go.

    Attributes:
        cached: Rows that need no computing, ``(B, S)`` bool.
        bytes_read: Bytes put into the cache, per prompt.
        hits: Chunks found, per prompt.
        misses: Chunks encoded first, per prompt.
        states: What each column's token carried into the layers asked for, ``(B, N, hidden)``, by
            layer; zeros where nothing is stored.
    """

    cached: Tensor
    bytes_read: list[int]
    hits: list[int]
    misses: list[int]
    states: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    def empty(cls, batch: Batch) -> Assembled:
        """Nothing cached."""
        count = batch.layout.batch_size
        return cls(torch.zeros_like(batch.layout.is_pad), [0] * count, [0] * count, [0] * count)


def from_chunks(
    batch: Batch,
    pieces: Sequence[Pieces],
    cache: RowCache,
    encoder: Encoder,
    rope: RopeSpec,
    watch: Stopwatch,
    layers: Sequence[int] = (),
) -> Assembled:
    """Fills the cache with the prefix and the chunks, each encoded alone and moved into place.

    What they carried into ``layers`` is laid out beside it.
    """
    layout = batch.layout
    wanted = [wanted_pieces(batch, index) for index in range(layout.batch_size)]
    found = encoder.find([piece for prompt in wanted for piece in prompt], watch, layers)
    result = Assembled.empty(batch)
    result.cached = (layout.kind == Kind.PREFIX) | is_held(layout)
    watch.start()
    for index, prompt in enumerate(wanted):
        result.misses[index] = len(pieces[index].chunks)
        if not prompt:  # computed in full, and without a prefix
            continue
        kvs = [found.kvs[piece] for piece in prompt]
        rows = (result.cached[index]).nonzero().squeeze(1)
        _place(cache, index, kvs, layout.order[index, rows], layout.position[index, rows], rope)
        chunks = prompt[1:] if pieces[index].prefix else prompt
        result.bytes_read[index] = sum(kv.num_bytes for kv in kvs)
        for layer in layers:
            stored = [found.states[piece, layer] for piece in prompt]
            _lay_states(result.states, layer, index, stored, layout.order[index, rows], cache)
            result.bytes_read[index] += sum(states.num_bytes for states in stored)
        result.hits[index] = sum(piece in found.hits for piece in chunks)
        result.misses[index] -= result.hits[index]
    watch.stop("relocate_s")
    return result


def wanted_pieces(batch: Batch, index: int) -> list[Piece]:
    """The prefix (if any), then the chunks, each with the ghosts it is encoded after."""
    layout, ids = batch.layout, batch.input_ids[index]
    kind, chunk = layout.kind[index], layout.chunk[index]
    encoded, ghost = is_held(layout)[index], kind == Kind.GHOST

    def piece(own: Tensor, ghosts: Tensor) -> Piece:
        return Piece(tuple(ids[own].tolist()), tuple(ids[ghosts].tolist()))

    prefix = tuple(ids[kind == Kind.PREFIX].tolist())
    chunks = chunk[encoded].unique().tolist()
    return ([Piece(prefix)] if prefix else []) + [
        piece(encoded & (chunk == c), ghost & (chunk == c)) for c in chunks
    ]


def is_held(layout: Layout) -> Tensor:
    """Rows that chunk caches hold; in a prompt of full attention there are none, ``(B, S)``."""
    return layout.is_encoded & (layout.group != GLOBAL)


def _place(
    cache: RowCache, prompt: int, kvs: list[ChunkKV], columns: Tensor, positions: Tensor, rope
) -> None:
    """Moves one prompt's pieces to ``positions`` ``(S,)`` and writes them into ``columns``."""
    encoded_at = torch.cat([torch.arange(kv.num_tokens) + kv.origin for kv in kvs])
    shift = positions - encoded_at.to(positions.device)
    turns = _Turns(shift, rope) if bool(shift.any()) else None
    starts = columns[_offsets(kvs)].tolist()
    runs = [(slice(a, a + kv.num_tokens), kv) for a, kv in zip(starts, kvs, strict=True)]
    for layer in range(len(cache)):
        done = 0
        for run, kv in runs:
            keys = kv.keys[layer].to(positions.device, non_blocking=True)
            values = kv.values[layer].to(positions.device, non_blocking=True)
            own_keys, own_values = cache.room(layer, prompt, run, keys, values)
            own_values.copy_(values)
            if turns is None:
                own_keys.copy_(keys)
            else:
                turn_keys(keys, turns.of(layer).cut(slice(done, done + kv.num_tokens)), own_keys)
            done += kv.num_tokens


def _offsets(kvs: list[ChunkKV]) -> list[int]:
    """Of each piece its first token's place among all."""
    return list(accumulate((kv.num_tokens for kv in kvs[:-1]), initial=0))


class _Turns:
    """Rotations by layer; layers that share their frequencies share the rotation."""

    def __init__(self, shift: Tensor, rope: RopeSpec):
        self.shift, self.rope = shift, rope
        self._made: dict[tuple[float, ...], Turn] = {}
        self._keys = [tuple(freq.tolist()) for freq in rope.inv_freq]

    def of(self, layer: int) -> Turn:
        """Axes ``(1, S, R / 2)``."""
        key = self._keys[layer]
        if key not in self._made:
            turn = Turn.of(self.shift[None], self.rope.inv_freq[layer])
            self._made[key] = Turn(turn.cos[0], turn.sin[0])
        return self._made[key]


def _lay_states(
    states: dict[int, Tensor],
    layer: int,
    prompt: int,
    stored: list[ChunkStates],
    columns: Tensor,
    cache: RowCache,
) -> None:
    """Writes what one prompt's pieces carried into ``layer`` at their ``columns`` ``(S,)``."""
    joined = torch.cat([piece.states for piece in stored]).to(columns.device)
    if layer not in states:
        shape = (len(cache.layers[0].keys), cache.num_columns, joined.shape[-1])
        states[layer] = joined.new_zeros(shape)
    states[layer][prompt].index_copy_(0, columns, joined)


def from_prefix(
    batch: Batch,
    pieces: Sequence[Pieces],
    cache: RowCache,
    tree: PrefixTree,
    fingerprint: str,
    watch: Stopwatch,
) -> Assembled:
    """Fills the cache with the longest exact prefix that an earlier prompt left behind."""
    result = Assembled.empty(batch)
    for index, prompt in enumerate(pieces):
        watch.start()
        path = [prompt.prefix, *prompt.chunks]
        with tree.match(fingerprint, path) as match:
            watch.stop("lookup_s")
            match.load(cache, index)
            result.cached[index] = ~batch.layout.is_pad[index] & (
                batch.layout.order[index] < match.num_tokens
            )
            result.bytes_read[index] = match.num_bytes
            result.hits[index] = max(0, len(match.exacts) - bool(prompt.prefix))
            result.misses[index] = len(prompt.chunks) - result.hits[index]
            watch.stop("load_s")
    return result
