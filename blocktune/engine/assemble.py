"""From prompts to a cache that holds everything a method does not compute."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from blocktune.cache import ChunkKV, RowCache
from blocktune.cache.chunk_file import FileKV
from blocktune.engine.encode import Found
from blocktune.engine.state import ServedBatch
from blocktune.layout import GLOBAL, Kind, Layout
from blocktune.methods.hooks import ChunkLoader, DamagedChunk
from blocktune.positions import RopeSpec, Rotation, rotate_keys
from blocktune.prompt import Batch, Pieces


@dataclass
class Assembled:
    """A batch whose cache is filled as far as a method's caches go."""

    cached: Tensor  # rows that need no computing, ``(B, S)`` bool
    bytes_read: list[int]  # bytes put into the cache, per prompt
    hits: list[int]  # chunks found, per prompt; ``misses`` were encoded first
    misses: list[int]
    prefix_tokens: list[int]  # tokens of an exact prefix found, per prompt
    prefix_disk_tokens: list[int]  # those of them that were read from the store's folder
    states: dict[int, Tensor] = field(default_factory=dict)  # by layer, (B, N, hidden)

    @classmethod
    def empty(cls, batch: Batch) -> Assembled:
        """Nothing cached."""
        count = batch.layout.batch_size
        return cls(torch.zeros_like(batch.layout.is_pad), *([0] * count for _ in range(5)))

    def found_prefix(
        self, layout: Layout, index: int, pieces: Pieces, num_tokens: int, num_bytes: int, disk: int
    ) -> None:
        """Notes the exact prefix of ``num_tokens`` tokens, ``disk`` of them from files."""
        ends = [*accumulate(map(len, pieces.chunks), initial=len(pieces.prefix))][1:]
        self.cached[index] = ~layout.is_pad[index] & (layout.order[index] < num_tokens)
        self.bytes_read[index], self.prefix_tokens[index] = num_bytes, num_tokens
        self.prefix_disk_tokens[index] = disk
        self.hits[index] = sum(end <= num_tokens for end in ends)
        self.misses[index] = len(ends) - self.hits[index]


def from_chunks(
    served: ServedBatch,
    layers: Sequence[int] = (),
    loader: ChunkLoader | None = None,
    found: Found | None = None,
    lazy: bool = True,
) -> Assembled:
    """Fills the cache with the prefix and the chunks, each encoded alone and moved into place.

    What they carried into ``layers`` is laid out beside it. ``found``: the chunks, if they were
    looked up; else the ``loader`` or the store is asked. ``lazy``: chunks that no memory will hold
    are read into their place at once; one that fails only then raises `DamagedChunk`.
    """
    batch, cache, watch, state = served.batch, served.cache, served.watch, served.state
    layout = batch.layout
    if found is None:
        together = [piece for prompt in served.wanted for piece in prompt]
        found = state.encoder.find(together, watch, layers, loader, lazy=lazy)
    hits = found.hits
    result = Assembled.empty(batch)
    result.cached = (layout.kind == Kind.PREFIX) | is_held(layout)
    watch.start()
    for index, prompt in enumerate(served.wanted):
        result.misses[index] = len(served.pieces[index].chunks)
        if not prompt:  # computed in full, and without a prefix
            continue
        kvs = [found.kvs[piece] for piece in prompt]
        rows = (result.cached[index]).nonzero().squeeze(1)
        columns, positions = layout.order[index, rows], layout.position[index, rows]
        fill = relocator(cache, index, kvs, columns, positions, state.rope)
        for layer in range(len(cache)):
            fill(layer)
        result.bytes_read[index] = sum(kv.num_bytes for kv in kvs)
        for layer in layers:
            stored = [found.states[piece, layer] for piece in prompt]
            joined = torch.cat([piece.states for piece in stored]).to(columns.device)
            if layer not in result.states:
                shape = (layout.batch_size, cache.num_columns, joined.shape[-1])
                result.states[layer] = joined.new_zeros(shape)
            result.states[layer][index].index_copy_(0, columns, joined)
            result.bytes_read[index] += sum(states.num_bytes for states in stored)
        chunks = [piece for piece in prompt if not piece.is_prefix]
        result.hits[index] = sum(piece in hits for piece in chunks)
        result.misses[index] -= result.hits[index]
    watch.stop("relocate_s")
    return result


def from_prefix(served: ServedBatch) -> Assembled:
    """Fills the cache with the longest exact prefix that an earlier prompt left behind."""
    result, state, watch = Assembled.empty(served.batch), served.state, served.watch
    tree = state.prefixes(served.method)
    for index, prompt in enumerate(served.pieces):
        watch.start()
        with tree.match(state.encoder.fingerprint, prompt.context) as match:
            watch.stop("lookup_s")
            match.load(served.cache, index)
            facts = match.num_tokens, match.num_bytes, match.disk_tokens
            result.found_prefix(served.batch.layout, index, prompt, *facts)
            watch.stop("load_s")
    return result


def is_held(layout: Layout) -> Tensor:
    """Rows that chunk caches hold; in a prompt of full attention there are none, ``(B, S)``."""
    return layout.is_encoded & (layout.group != GLOBAL)


def relocator(
    cache: RowCache,
    prompt: int,
    kvs: list[ChunkKV],
    columns: Tensor,
    positions: Tensor,
    rope: RopeSpec,
) -> Callable[[int], None]:
    """Moves one prompt's pieces to ``positions`` ``(S,)`` and into ``columns``, layer by layer."""
    encoded_at = torch.cat([torch.arange(kv.num_tokens) + kv.origin for kv in kvs])
    shift = positions - encoded_at.to(positions.device)
    turns = _Rotations(shift, rope) if bool(shift.any()) else None
    runs, spare = _segments(kvs, columns), {}

    def fill(layer: int) -> None:
        rotated = None if turns is None else ("key", "value")[rope.layers[layer].in_values]
        like = runs[0].like(layer, columns.device)
        for run in runs:
            room = cache.room(layer, prompt, run.columns, *like)
            for name, out in zip(("key", "value"), room, strict=True):
                try:
                    if name == rotated:
                        turn = turns.of(layer, out.shape[-1]).cut(run.tokens)
                        rotate_keys(run.states(layer, name, spare).to(out.device), turn, out)
                    else:
                        run.put(layer, name, out)
                except ValueError as error:  # of a file
                    raise DamagedChunk(f"layer {layer}: {error}") from None

    return fill


class _Segment(NamedTuple):
    """Adjacent pieces: their tokens among all cached ones, and their columns."""

    kvs: list[ChunkKV]
    tokens: slice
    columns: slice

    @property
    def is_file(self) -> bool:
        """Whether it is read from one file."""
        return isinstance(self.kvs[0], FileKV) and len(self.kvs) == 1

    def like(self, layer: int, device: torch.device) -> list[Tensor]:
        """Tensors of the shapes and types of the first one's keys and values."""
        kv = self.kvs[0].like if isinstance(self.kvs[0], FileKV) else self.kvs[0]
        pair = (kv.keys[layer], kv.values[layer])
        return [one.new_empty((), device=device).expand_as(one) for one in pair]

    def states(self, layer: int, name: str, spare: dict[torch.Size, Tensor]) -> Tensor:
        """Their keys or values, ``(K, S, D)``; one file is read into ``spare`` memory."""
        if self.is_file:
            like = getattr(self.kvs[0].like, f"{name}s")[layer]
            if like.shape not in spare:  # new memory for each would take longer than reading
                spare[like.shape] = like.new_empty(like.shape)
            self.kvs[0].read_into(f"{name}.{layer}", spare[like.shape])
            return spare[like.shape]
        found = [getattr(kv, f"{name}s")[layer] for kv in self.kvs]
        return found[0] if len(found) == 1 else torch.cat(found, 1)

    def put(self, layer: int, name: str, out: Tensor) -> None:
        """Writes their keys or values over ``out``."""
        if self.is_file:
            self.kvs[0].read_into(f"{name}.{layer}", out)
        else:
            out.copy_(self.states(layer, name, {}))


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
        self._made: dict[tuple, Rotation] = {}
        self._keys = [(tuple(one.inv_freq.tolist()), *one[1:]) for one in rope.layers]

    def of(self, layer: int, dim: int) -> Rotation:
        """Axes ``(1, S, P)``, for heads of ``dim`` dimensions."""
        key = (dim, self._keys[layer])
        if key not in self._made:
            turn = Rotation.of(self.shift[None], self.rope.layers[layer])
            self._made[key] = turn._replace(cos=turn.cos[0], sin=turn.sin[0]).over(dim)
        return self._made[key]
