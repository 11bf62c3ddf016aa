"""Which tokens of earlier prompts are nearest, and chunks made of their states."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from blocktune.cache import ChunkKV, ChunkStore
from blocktune.cache.fingerprint import chunk_key
from blocktune.cache.records import Record
from blocktune.positions import relocate_keys

if TYPE_CHECKING:
    from blocktune.methods import ServedModel
    from blocktune.prompt import Pieces

Ids = tuple[int, ...]
BITS, BASE = 256, 10_000.0
"""Random hyperplanes of a token's signature, and the base of the rotation before it."""
MOST = 256  # chunks that are laid out and not yet served, at most


def signatures(ids: Ids, model: ServedModel) -> Tensor:
    """Sides of random hyperplanes that the rotated embeddings are on, ``(S, BITS)`` of +-1."""
    device = model.embed.weight.device
    vectors = model.embed(torch.tensor(ids, device=device)).detach().float()
    first, second = vectors.chunk(2, dim=1)
    half = second.shape[1]
    angle = torch.arange(len(ids))[:, None] * BASE ** (-torch.arange(half) / half)
    cos, sin = angle.cos().to(device), angle.sin().to(device)
    turned = (first[:, :half] * cos - second * sin, second * cos + first[:, :half] * sin)
    planes = torch.randn(2 * half, BITS, generator=torch.Generator().manual_seed(0)).to(device)
    return torch.where(torch.cat(turned, 1) @ planes > 0, 1.0, -1.0)


class References:
    """Earlier prompts of one model, latest last, and chunks that wait to be made from them."""

    def __init__(self):
        self.prompts: OrderedDict[Ids, Tensor | None] = OrderedDict()
        self.waiting: OrderedDict[str, Callable[[], ChunkKV]] = OrderedDict()
        self.lock = threading.Lock()

    @classmethod
    def of(cls, store: ChunkStore, fingerprint: str) -> References:
        return store.note((cls, fingerprint), cls)

    def nearest(self, pieces: Pieces, model: ServedModel) -> tuple[float, Ids, Tensor] | None:
        """The prompt whose tokens are most similar to the chunks': how much, its tokens, the match.

        Similarity is 1 for equal signatures and about 0 for unrelated ones, mean over the tokens.
        """
        own, start, found = signatures(pieces.context, model), len(pieces.prefix), None
        with self.lock:
            known = list(self.prompts.items())
        for other, theirs in known:
            if theirs is None:
                self.prompts[other] = theirs = signatures(other, model)
            best = (own @ theirs.T).max(1)
            similarity = float(best.values[start:].mean() / BITS)
            if found is None or similarity > found[0]:
                found = similarity, other, best.indices
        return found

    def keep(self, kept: OrderedDict, key, value, most: int) -> None:
        with self.lock:
            kept[key] = value
            kept.move_to_end(key)
            while len(kept) > most:
                kept.popitem(last=False)


def entry_of(ids: Ids, fingerprint: str) -> tuple[str, Ids, str, type[Record]]:
    """How a store is asked for a prompt."""
    return chunk_key(fingerprint, ids, {"reference": True}), ids, fingerprint, Record


def made_from(record: Record, match: Tensor, chunk: Ids, start: int, model: ServedModel) -> ChunkKV:
    """A chunk at ``start`` whose tokens have the states of those that they match, moved to them."""
    rows = match[start : start + len(chunk)].to(record.data[0].device)
    shift = (torch.arange(start, start + len(chunk), device=rows.device) - rows)[None]
    states, half = [tensor[:, rows] for tensor in record.data], len(record.data) // 2
    for layer, rope in enumerate(model.rope.layers):
        place = layer + half * rope.in_values
        states[place] = relocate_keys(states[place][None], shift, rope)[0]
    keys, values = tuple(states[:half]), tuple(states[half:])
    return ChunkKV(keys, values, torch.tensor(chunk), record.fingerprint, start).compact()
