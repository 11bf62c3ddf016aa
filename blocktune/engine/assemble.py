"""From prompts to a cache that holds everything a method does not compute."""

from __future__ import annotations

from collections.abc import Sequence
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
        relocate(cache, index, kvs, columns, positions, state.rope)
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


def relocate(
    cache: RowCache,
    prompt: int,
    kvs: list[ChunkKV],
    columns: Tensor,
    positions: Tensor,
    rope: RopeSpec,
) -> None:
    """Moves one prompt's pieces to ``positions`` ``(S,)`` and writes them into ``columns``."""
    encoded_at = torch.cat([torch.arange(kv.num_tokens) + kv.origin for kv in kvs])
    turns = _Rotations(positions.cpu() - encoded_at, rope, columns.device)
    runs = _segments(kvs, columns)
    waiting: list[list[_Part]] = [[] for _ in runs]
    blocks = _adjacent(runs)
    for layer, shapes in enumerate(runs[0].like(columns.device)):
        for span, members in blocks:
            room = cache.room(layer, prompt, span, *shapes)
            for kind, whole in zip(("key", "value"), room, strict=True):
                sizes = [runs[index].columns.stop - runs[index].columns.start for index in members]
                for index, out in zip(members, whole.split(sizes, 1), strict=True):
                    run, turn = runs[index], turns.of(kind, layer, runs[index].tokens, out.shape[2])
                    if run.is_file:
                        waiting[index].append((f"{kind}.{layer}", out, turn))
                    elif turn is None:
                        out.copy_(run.states(kind, layer))
                    else:
                        rotate_keys(run.states(kind, layer).to(out.device), turn, out)
    spare: dict[torch.Size, Tensor] = {}  # new memory for each would take longer than reading
    for run, parts in zip(runs, waiting, strict=True):
        try:
            if parts:
                _read(run.kvs[0], parts, spare)
        except ValueError as error:
            raise DamagedChunk(str(error)) from None


_Part = tuple[str, Tensor, Rotation | None]
"""The name of a tensor in a file, where it goes, and how it is rotated."""


def _read(kv: FileKV, parts: list[_Part], spare: dict[torch.Size, Tensor]) -> None:
    """Reads what is not rotated into its place in one go, and the rest, one by one, by ``spare``.

    What was just read is rotated while a core's cache has it.
    """
    kv.file.read_into({name: out for name, out, turn in parts if turn is None})
    for name, out, turn in parts:
        if turn is not None:
            if out.shape not in spare:
                spare[out.shape] = out.new_empty(out.shape)
            kv.file.read_into({name: spare[out.shape]})
            rotate_keys(spare[out.shape], turn, out)


class _Segment(NamedTuple):
    """Adjacent pieces: their tokens among all cached ones, and their columns."""

    kvs: list[ChunkKV]
    tokens: slice
    columns: slice
    is_file: bool  # whether it is one file, to be read into the CPU's memory

    def like(self, device: torch.device) -> list[list[Tensor]]:
        """Of each layer, tensors of the shapes and types of the first one's keys and values."""
        kv = self.kvs[0].like if isinstance(self.kvs[0], FileKV) else self.kvs[0]
        pairs = zip(kv.keys, kv.values, strict=True)
        return [[one.new_empty((), device=device).expand_as(one) for one in pair] for pair in pairs]

    def states(self, kind: str, layer: int) -> Tensor:
        """Their keys or values, ``(K, S, D)``."""
        found = [getattr(kv, f"{kind}s")[layer] for kv in self.kvs]
        return found[0] if len(found) == 1 else torch.cat(found, 1)


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
            runs[-1] = _Segment([*last.kvs, kv], tokens, span, False)
        else:
            runs.append(_Segment([kv], tokens, span, isinstance(kv, FileKV)))
    return runs


def _adjacent(runs: list[_Segment]) -> list[tuple[slice, list[int]]]:
    """Columns without a gap, and the runs in them: one view of a layer for all."""
    found: list[tuple[slice, list[int]]] = []
    for index, run in enumerate(runs):
        if found and found[-1][0].stop == run.columns.start:
            span, members = found.pop()
            found.append((slice(span.start, run.columns.stop), [*members, index]))
        else:
            found.append((run.columns, [index]))
    return found


class _Rotations:
    """Rotations of the runs of a prompt; layers that share their frequencies share them."""

    def __init__(self, shift: Tensor, rope: RopeSpec, device: torch.device):
        """By ``shift`` ``(S,)`` positions, on the CPU; rotations are made on ``device``."""
        self.shift, self.rope, self.device = shift, rope, device
        moves = bool(shift.any())
        self._kinds = [("key", "value")[one.in_values] if moves else "" for one in rope.layers]
        known = [(tuple(one.inv_freq.tolist()), *one[1:]) for one in rope.layers]
        self._same = [known.index(one) for one in known]  # the first layer of the same rotation
        self._made: dict[tuple, Rotation] = {}

    def of(self, kind: str, layer: int, tokens: slice, dim: int) -> Rotation | None:
        """Of heads of ``dim`` dimensions: ``(1, S, P)``, or ``(1, 1, P)`` where all move alike.

        None: there is nothing to rotate.
        """
        if kind != self._kinds[layer]:
            return None
        key = self._same[layer], tokens.start, dim
        if key not in self._made:
            shift = self.shift[tokens]
            if bool((shift == shift[0]).all()):  # a chunk's tokens do
                shift = shift[:1]
            turn = Rotation.of(shift[None].to(self.device), self.rope.layers[layer])
            self._made[key] = turn._replace(cos=turn.cos[0], sin=turn.sin[0]).over(dim)
        return self._made[key]
