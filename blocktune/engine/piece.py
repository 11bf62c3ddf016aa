"""What is encoded by itself: the prefix, or a chunk after its ghosts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from blocktune.layout import GLOBAL
from blocktune.prompt import LayoutSpec, Pieces, Prompt, lay_out

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


def alone(piece: Piece) -> Prompt:
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
