"""From examples to a cache that holds everything a method does not compute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blocktune.cache import ChunkKV, PrefixTree, RowCache
from blocktune.engine.account import Stopwatch
from blocktune.engine.encode import Encoder, Piece
from blocktune.layout import Kind
from blocktune.positions import RopeSpec, relocate_keys
from blocktune.prompt import Batch, Pieces


@dataclass
class Assembled:
    """A batch whose cache is filled as far as a method's caches go.

    Attributes:
        cached: Rows that need no computing, ``(B, S)`` bool.
        bytes_read: Bytes put into the cache, per prompt.
        hits: Chunks found, per prompt.
        misses: Chunks encoded first, per prompt.
    """

    cached: Tensor
    bytes_read: list[int]
    hits: list[int]
    misses: list[int]

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
) -> Assembled:
    """Fills the cache with the prefix and the chunks, each encoded alone and moved into place."""
    layout = batch.layout
    wanted = [_wanted(batch, index, prompt) for index, prompt in enumerate(pieces)]
    found = encoder.find([piece for prompt in wanted for piece in prompt], watch)
    result = Assembled.empty(batch)
    result.cached = (layout.kind == Kind.PREFIX) | layout.is_context
    watch.start()
    for index, prompt in enumerate(wanted):
        kvs = [found.kvs[piece] for piece in prompt]
        rows = (result.cached[index]).nonzero().squeeze(1)
        _place(cache, index, kvs, layout.order[index, rows], layout.position[index, rows], rope)
        chunks = prompt[1:] if pieces[index].prefix else prompt
        result.bytes_read[index] = sum(kv.num_bytes for kv in kvs)
        result.hits[index] = sum(piece in found.hits for piece in chunks)
        result.misses[index] = len(chunks) - result.hits[index]
    watch.stop("relocate_s")
    return result


def _wanted(batch: Batch, index: int, pieces: Pieces) -> list[Piece]:
    """The prefix (if any), then the chunks, each with the ghosts it is encoded after."""
    layout = batch.layout
    ghost = layout.kind[index] == Kind.GHOST
    first = batch.input_ids[index, ghost & (layout.chunk[index] == 0)]  # alike for all chunks
    ghosts = tuple(first.tolist())
    prefix = [Piece(pieces.prefix)] if pieces.prefix else []
    return prefix + [Piece(chunk, ghosts) for chunk in pieces.chunks]


def _place(
    cache: RowCache, prompt: int, kvs: list[ChunkKV], columns: Tensor, positions: Tensor, rope
) -> None:
    """Moves one prompt's pieces to ``positions`` ``(S,)`` and writes them into ``columns``."""
    encoded_at = torch.cat([torch.arange(kv.num_tokens) + kv.origin for kv in kvs])
    shift = (positions - encoded_at.to(positions.device))[None]
    moves = bool(shift.any())
    for layer in range(len(cache)):
        keys = torch.cat([kv.keys[layer] for kv in kvs], dim=1).to(positions.device)
        values = torch.cat([kv.values[layer] for kv in kvs], dim=1).to(positions.device)
        if moves:
            keys = relocate_keys(keys[None], shift, rope.inv_freq[layer])[0]
        cache.load_columns(layer, prompt, columns, keys, values)


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
