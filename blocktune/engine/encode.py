"""Encoding chunks alone, and finding encoded ones again."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from transformers import DynamicCache

from blocktune.attention import SplitPlan
from blocktune.cache import ChunkKV, ChunkStore, chunk_key
from blocktune.engine.account import Stopwatch
from blocktune.layout import GLOBAL
from blocktune.prompt import LayoutSpec, Pieces, Prompt, lay_out, stack

Ids = tuple[int, ...]
TOKENS_PER_PASS = 16_384
"""Rows, padding included, that are encoded in one forward pass."""


@dataclass(frozen=True)
class Piece:
    """Something that is encoded by itself and kept: the prefix, or a chunk after its ghosts.

    Attributes:
        ids: Tokens that are stored.
        ghosts: Tokens it is encoded after and that are then forgotten.
    """

    ids: Ids
    ghosts: Ids = ()


class Found(NamedTuple):
    """Encoded pieces and what finding them took.

    Attributes:
        kvs: By piece.
        hits: Pieces that were in the store.
        misses: Pieces that had to be encoded.
    """

    kvs: dict[Piece, ChunkKV]
    hits: frozenset[Piece]
    misses: frozenset[Piece]


class Encoder:
    """Turns pieces into their keys and values, through the store."""

    def __init__(self, model: nn.Module, store: ChunkStore, fingerprint: str, pad_id: int):
        """Encodes with ``model`` (attached to blocktune's attention) and keeps in ``store``."""
        self.model, self.store = model, store
        self.fingerprint, self.pad_id = fingerprint, pad_id

    def find(self, pieces: Sequence[Piece], watch: Stopwatch) -> Found:
        """Looks every piece up and encodes what is missing, each piece once.

        Args:
            pieces: What is wanted; repeats are welcome.
            watch: Gets ``lookup_s``, ``load_s`` and ``encode_s``.
        """
        kvs: dict[Piece, ChunkKV] = {}
        missing = []
        for piece in dict.fromkeys(pieces):
            found = self.store.lookup(self._key(piece), piece.ids, self.fingerprint)
            watch.add("lookup_s", found.lookup_s)
            watch.add("load_s", found.load_s)
            if found.kv is None:
                missing.append(piece)
            else:
                kvs[piece] = found.kv
        hits = frozenset(kvs)
        watch.start()
        for piece, kv in self._encode(missing):
            self.store.put(self._key(piece), kv)
            kvs[piece] = kv
        watch.stop("encode_s")
        return Found(kvs, hits, frozenset(missing))

    def _key(self, piece: Piece) -> str:
        return chunk_key(self.fingerprint, piece.ids, {"ghosts": list(piece.ghosts)})

    def _encode(self, pieces: list[Piece]) -> Iterator[tuple[Piece, ChunkKV]]:
        for group in grouped(pieces):
            yield from zip(group, self._encode_together(group), strict=True)

    @torch.no_grad()
    def _encode_together(self, pieces: list[Piece]) -> list[ChunkKV]:
        batch = stack([_alone(piece) for piece in pieces], self.pad_id).to(self.model.device)
        cache = DynamicCache()
        self.model(
            batch.input_ids,
            position_ids=batch.layout.position,
            plan=SplitPlan(batch.layout),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return [self._cut(cache, index, piece) for index, piece in enumerate(pieces)]

    def _cut(self, cache: DynamicCache, index: int, piece: Piece) -> ChunkKV:
        span = slice(len(piece.ghosts), len(piece.ghosts) + len(piece.ids))
        return ChunkKV(
            keys=tuple(layer.keys[index, :, span] for layer in cache.layers),
            values=tuple(layer.values[index, :, span] for layer in cache.layers),
            token_ids=torch.tensor(piece.ids),
            fingerprint=self.fingerprint,
        ).compact()


def _alone(piece: Piece) -> Prompt:
    """The rows of a piece by itself: its tokens from position 0, its ghosts before that."""
    spec = LayoutSpec(shared_prefix=bool(piece.ghosts))
    prompt = lay_out(Pieces(prefix=piece.ghosts, chunks=(piece.ids,), query=()), spec)
    keep = (prompt.layout.group != GLOBAL)[0]
    layout = prompt.layout.map(lambda field: field[:, keep])
    moved = layout.position - len(piece.ghosts)
    ids = torch.tensor(prompt.ids)[keep].tolist()
    labels = torch.tensor(prompt.labels)[keep].tolist()
    return Prompt(tuple(ids), dataclasses.replace(layout, position=moved), tuple(labels))


def grouped(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Pieces of similar length, as many as fit into a pass."""
    group: list[Piece] = []
    for piece in sorted(pieces, key=_size):
        if group and (len(group) + 1) * _size(piece) > TOKENS_PER_PASS:
            yield group
            group = []
        group.append(piece)
    if group:
        yield group


def _size(piece: Piece) -> int:
    return len(piece.ghosts) + len(piece.ids)
