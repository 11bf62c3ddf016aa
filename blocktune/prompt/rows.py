"""From token pieces to the rows of a forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from blocktune.layout import FOREVER, GLOBAL, NO_CHUNK, NO_ROW, Kind, Layout
from blocktune.positions import place
from blocktune.prompt.pieces import Pieces
from blocktune.prompt.spec import LayoutSpec

IGNORED = -100
"""Label of a row that carries no loss."""


@dataclass(frozen=True)
class Prompt:
    """One row of a batch: token ids, what each row is, and what is learnt.

    Attributes:
        ids: Token id of every row, ``S`` of them; link rows hold ``link_base + slot``.
        layout: ``(1, S)``.
        labels: ``ids`` on answer rows and -100 elsewhere, not shifted.
    """

    ids: tuple[int, ...]
    layout: Layout
    labels: tuple[int, ...]


def lay_out(
    pieces: Pieces, spec: LayoutSpec, link_base: int | None = None, ghost_id: int | None = None
) -> Prompt:
    """Lays pieces out: prefix, per chunk its ghosts, tokens and links, query, answer.

    With links before, a chunk's rows are its links, ghosts and tokens. ``order`` counts the rows
    that are not ghosts. The ``p`` ghosts of a chunk whose first token has order ``o`` and position
    ``s`` have orders ``o - p ...`` and positions ``s - p ...``, in the group of the chunk.

    Args:
        pieces: Token ids, see `make_pieces`.
        spec: Which rows there are.
        link_base: Id of link slot 0, the model's vocabulary size; every chunk has the same links.
        ghost_id: Token id of a blank.

    Raises:
        ValueError: If the layout needs an id that was not given.
    """
    if spec.num_links and link_base is None:
        raise ValueError("this layout has link tokens: lay_out needs link_base (vocabulary size)")
    if spec.num_ghosts and ghost_id is None:
        raise ValueError("this layout has blank ghosts: lay_out needs ghost_id (a blank token)")
    links = tuple(range(link_base, link_base + spec.num_links)) if spec.num_links else ()
    ghosts = pieces.prefix if spec.shared_prefix else (ghost_id,) * spec.num_ghosts
    return _to_prompt(list(_segments(pieces, spec, links, ghosts)))


class _Segment(NamedTuple):
    """A run of rows of one kind, contiguous in position and order."""

    ids: tuple[int, ...]
    kind: Kind
    position: int
    order: int
    chunk: int = NO_CHUNK
    group: int = GLOBAL


def _segments(
    pieces: Pieces, spec: LayoutSpec, links: tuple[int, ...], ghosts: tuple[int, ...]
) -> Iterator[_Segment]:
    lengths = [len(chunk) + len(links) for chunk in pieces.chunks]
    starts, query_start = place(spec.placement, len(pieces.prefix), lengths)
    yield _Segment(pieces.prefix, Kind.PREFIX, 0, 0)
    order = len(pieces.prefix)
    for index, chunk in enumerate(pieces.chunks):
        yield from _chunk_segments(index, chunk, spec, links, ghosts, starts[index], order)
        order += lengths[index]
    yield _Segment(pieces.query, Kind.QUERY, query_start, order)
    after = len(pieces.query)
    yield _Segment(pieces.answer, Kind.ANSWER, query_start + after, order + after)


def _chunk_segments(
    index: int, chunk: tuple[int, ...], spec: LayoutSpec, links, ghosts, position: int, order: int
) -> Iterator[_Segment]:
    group = index if spec.block else GLOBAL
    lead = len(links) if spec.link_side == "before" else 0
    first, back = lead, len(ghosts)
    if lead:
        yield _Segment(links, Kind.LINK, position, order, index)
    at, when = position + first, order + first
    yield _Segment(ghosts, Kind.GHOST, at - back, when - back, index, group)
    yield _Segment(chunk, Kind.CHUNK, at, when, index, group)
    if not lead:
        yield _Segment(links, Kind.LINK, at + len(chunk), when + len(chunk), index)


def _to_prompt(segments: list[_Segment]) -> Prompt:
    lengths = torch.tensor([len(s.ids) for s in segments])
    first = torch.cumsum(lengths, 0) - lengths
    offset = torch.arange(int(lengths.sum())) - first.repeat_interleave(lengths)

    def column(values: list[int]) -> Tensor:
        return torch.tensor(values).repeat_interleave(lengths)

    rows = {
        "kind": column([s.kind for s in segments]),
        "chunk": column([s.chunk for s in segments]),
        "offset": offset,
        "position": column([s.position for s in segments]) + offset,
        "order": column([s.order for s in segments]) + offset,
        "group": column([s.group for s in segments]),
        "sample": torch.zeros_like(offset),
        "supersedes": torch.full_like(offset, NO_ROW),
        "until": torch.full_like(offset, FOREVER),
    }
    ids, labels = [], []
    for segment in segments:
        ids += segment.ids
        answer = segment.kind == Kind.ANSWER
        labels += segment.ids if answer else [IGNORED] * len(segment.ids)
    return Prompt(tuple(ids), Layout(**{k: v[None] for k, v in rows.items()}), tuple(labels))
