"""Fills a batch's KV cache with the cached states that a method does not recompute."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from blocktune.cache import ChunkKV, RowCache
from blocktune.cache.store.chunk_file import FileKV
from blocktune.engine.encode import Found
from blocktune.engine.state import ServedBatch
from blocktune.layout import GLOBAL, Kind, Layout
from blocktune.methods.base import ChunkLoader, DamagedChunk
from blocktune.positions import RopeSpec, Rotation, rotate_keys
from blocktune.prompt import Batch, Pieces


@dataclass
class Assembled:
    """What was loaded into a batch's cache before computing. Lists have one item per prompt."""

    cached: Tensor  # rows that need not be computed, ``(B, S)`` bool
    bytes_read: list[int]  # bytes loaded into the cache
    hits: list[int]  # number of chunks found; ``misses`` were encoded first
    misses: list[int]
    prefix_tokens: list[int]  # tokens of the exact prefix found
    prefix_disk_tokens: list[int]  # how many of them were read from the store's folder
    states: dict[int, Tensor] = field(default_factory=dict)  # by layer, (B, N, hidden)

    @classmethod
    def empty(cls, batch: Batch) -> Assembled:
        """Nothing cached."""
        count = batch.layout.batch_size
        return cls(torch.zeros_like(batch.layout.is_pad), *([0] * count for _ in range(5)))

    def found_prefix(
        self, layout: Layout, index: int, pieces: Pieces, num_tokens: int, num_bytes: int, disk: int
    ) -> None:
        """Records an exact prefix of ``num_tokens`` tokens, ``disk`` of them read from files."""
        ends = [*accumulate(map(len, pieces.chunks), initial=len(pieces.prefix))][1:]
        self.cached[index] = ~layout.is_pad[index] & (layout.order[index] < num_tokens)
        self.bytes_read[index], self.prefix_tokens[index] = num_bytes, num_tokens
        self.prefix_disk_tokens[index] = disk
        self.hits[index] = sum(end <= num_tokens for end in ends)
        self.misses[index] = len(ends) - self.hits[index]


def from_chunks(
    served: ServedBatch,
    loader: ChunkLoader | None = None,
    found: Found | None = None,
    lazy: bool = True,
) -> Assembled:
    """Fills the cache with the prefix and the chunks, moved to their positions.

    ``found`` are the chunks, if they were looked up already; ``loader`` and ``lazy`` are as in
    `Encoder.find`; a damaged file then raises `DamagedChunk`.
    """
    batch, cache, watch, state = served.batch, served.cache, served.watch, served.state
    layout, layers = batch.layout, state.inputs_of(served.method)
    if found is None:
        pieces = [piece for prompt in served.wanted for piece in prompt]
        found = state.encoder.find(pieces, watch, layers, loader, lazy=lazy)
    result, misses = Assembled.empty(batch), found.misses
    result.cached = (layout.kind == Kind.PREFIX) | is_held(layout)
    watch.start()
    for index, prompt in enumerate(served.wanted):
        result.hits[index] = sum(piece not in misses and not piece.is_prefix for piece in prompt)
        result.misses[index] = len(served.pieces[index].chunks) - result.hits[index]
        if not prompt:  # computed in full, and without a prefix
            continue
        kvs = [found.kvs[piece] for piece in prompt]
        rows = result.cached[index].nonzero().squeeze(1)
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
    watch.stop("relocate_s")
    return result


def from_prefix(served: ServedBatch) -> Assembled:
    """Fills the cache of each prompt with the longest exact prefix cached by earlier prompts."""
    result, state, watch = Assembled.empty(served.batch), served.state, served.watch
    tree = state.prefixes(served.method)
    for index, prompt in enumerate(served.pieces):
        watch.start()
        with tree.match(state.encoder.fingerprint, prompt.shareable) as match:
            watch.stop("lookup_s")
            match.load(served.cache, index)
            facts = match.num_tokens, match.num_bytes, match.disk_tokens
            result.found_prefix(served.batch.layout, index, prompt, *facts)
            watch.stop("load_s")
    return result


def is_held(layout: Layout) -> Tensor:
    """Rows whose states are in chunk caches, ``(B, S)`` bool; none in a full-attention prompt."""
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
    rotations = _Rotations(positions.cpu() - encoded_at, rope, columns.device)
    blocks = _blocks(kvs, columns)
    like = kvs[0].like if isinstance(kvs[0], FileKV) else kvs[0]
    for layer, pair in enumerate(zip(like.keys, like.values, strict=True)):
        examples = [t.new_empty((), device=columns.device).expand_as(t) for t in pair]
        for runs in blocks:
            span = slice(runs[0].columns.start, runs[-1].columns.stop)
            room = cache.room(layer, prompt, span, *examples)
            sizes = [run.columns.stop - run.columns.start for run in runs]
            for kind, whole in zip(("key", "value"), room, strict=True):
                for run, out in zip(runs, whole.split(sizes, 1), strict=True):
                    rotation = rotations.of(kind, layer, run.tokens)
                    if isinstance(run.kvs[0], FileKV):
                        run.reads.append((f"{kind}.{layer}", out, rotation))
                    elif rotation is None:
                        out.copy_(run.states(kind, layer))
                    else:
                        rotate_keys(run.states(kind, layer).to(out.device), rotation, out)
    try:
        _read_all(run for runs in blocks for run in runs if run.reads)
    except (OSError, ValueError) as error:
        raise DamagedChunk(str(error)) from None


@dataclass
class _Run:
    """Adjacent pieces that are moved together."""

    kvs: list[ChunkKV]  # a `FileKV` is alone
    tokens: slice  # among all cached tokens of the prompt
    columns: slice  # in the cache
    # to read from the file: a tensor's name, the output, and how it is rotated
    reads: list[tuple[str, Tensor, Rotation | None]] = field(default_factory=list)

    def states(self, kind: str, layer: int) -> Tensor:
        states = [getattr(kv, f"{kind}s")[layer] for kv in self.kvs]
        return states[0] if len(states) == 1 else torch.cat(states, 1)


def _read_all(runs: Iterable[_Run]) -> None:
    buffers: dict[torch.Size, Tensor] = {}  # reused: allocating each would take longer than reading
    for run in runs:
        file = run.kvs[0].file
        file.read_into({name: out for name, out, rotation in run.reads if rotation is None})
        for name, out, rotation in run.reads:
            if rotation is not None:  # one by one: it is rotated while it is in the CPU cache
                if out.shape not in buffers:
                    buffers[out.shape] = out.new_empty(out.shape)
                file.read_into({name: buffers[out.shape]})
                rotate_keys(buffers[out.shape], rotation, out)


def _blocks(kvs: list[ChunkKV], columns: Tensor) -> list[list[_Run]]:
    """Runs of each block of adjacent columns: of one piece on the CPU (for its cache), else all."""
    blocks: list[list[_Run]] = []
    starts = list(accumulate((kv.num_tokens for kv in kvs[:-1]), initial=0))
    for kv, start, column in zip(kvs, starts, columns[starts].tolist(), strict=True):
        tokens, span = slice(start, start + kv.num_tokens), slice(column, column + kv.num_tokens)
        last = blocks[-1][-1] if blocks else None
        if last is None or last.columns.stop != column:
            blocks.append([_Run([kv], tokens, span)])
        elif columns.is_cuda:
            tokens = slice(last.tokens.start, tokens.stop)
            span = slice(last.columns.start, span.stop)
            blocks[-1] = [_Run([*last.kvs, kv], tokens, span)]
        else:
            blocks[-1].append(_Run([kv], tokens, span))
    return blocks


class _Rotations:
    """Rotations by ``shift`` ``(S,)``, computed once for all layers with the same frequencies."""

    def __init__(self, shift: Tensor, rope: RopeSpec, device: torch.device):
        self.shift, self.rope, self.device = shift, rope, device
        self._moves = bool(shift.any())
        specs = [(tuple(spec.inv_freq.tolist()), *spec[1:]) for spec in rope.layers]
        self._same = [specs.index(spec) for spec in specs]  # first layer with the same rotation
        self._computed: dict[tuple, Rotation] = {}

    def of(self, kind: str, layer: int, tokens: slice) -> Rotation | None:
        """The rotation ``(1, S, P)`` of tokens, ``(1, 1, P)`` if it is one; None: not rotated."""
        if not self._moves or self.rope.layers[layer].in_values != (kind == "value"):
            return None
        key = self._same[layer], tokens.start
        if key not in self._computed:
            shift = self.shift[tokens]
            shift = shift[:1] if bool((shift == shift[0]).all()) else shift  # a chunk moves as one
            turn = Rotation.of(shift[None].to(self.device), self.rope.layers[layer])
            self._computed[key] = turn._replace(cos=turn.cos[0], sin=turn.sin[0])
        return self._computed[key]
