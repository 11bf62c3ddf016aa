"""From token pieces to the rows of a forward pass, as a `LayoutSpec` says."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from blocktune.layout import FOREVER, GLOBAL, NO_CHUNK, NO_ROW, Kind, Layout
from blocktune.positions import place
from blocktune.prompt.layout_spec import LayoutSpec
from blocktune.prompt.pieces import Ids, Pieces

IGNORED = -100  # label of a row that carries no loss


@dataclass(frozen=True)
class Prompt:
    """One row of a batch: token ids, what each row is, and what of it is stored."""

    ids: Ids  # of every row, ``S`` of them; link rows hold ``link_base + slot``
    layout: Layout  # ``(1, S)``
    prefix: Ids = ()
    chunks: tuple[tuple[Ids, Ids], ...] = ()  # tokens and the blanks before them; full: none

    @property
    def labels(self) -> Ids:
        """What is learnt: ``ids`` on answer rows and -100 elsewhere, not shifted."""
        return tuple(labels_of(tensor_of(self.ids), self.layout.kind[0]).tolist())


def tensor_of(ids: Sequence[int]) -> Tensor:
    """An int64 tensor of ids, several times as fast as `torch.tensor`."""
    return torch.frombuffer(array("q", ids), dtype=torch.int64) if ids else torch.tensor(ids)


def labels_of(ids: Tensor, kind: Tensor) -> Tensor:
    """The ids of answer rows, -100 elsewhere; tensors of one shape."""
    return torch.where(kind == Kind.ANSWER, ids, IGNORED)


def lay_out(
    pieces: Pieces,
    spec: LayoutSpec,
    link_base: int | None = None,
    blank_id: int | None = None,
    bos_id: int | None = None,
    contexts: Sequence[Ids] | None = None,
    spans: Sequence[int] | None = None,
) -> Prompt:
    """Lays pieces out: prefix, per chunk its blanks, tokens and links, query, answer, followups.

    Headers and trailers are around a chunk's tokens, in its group. Links before a chunk come before
    its blanks. ``order`` counts the rows that are not blanks. If the first row of a chunk has order
    ``o`` and position ``s``, its ``p`` blanks have orders ``o - p ...`` and positions ``s - p
    ...``, in the group of the chunk.

    ``link_base``, ``blank_id`` and ``bos_id`` are the ids of the first learned token (such as the
    model's vocabulary size), of a blank and of BOS; ValueError if the layout needs one that was not
    given. ``contexts`` are, for each chunk, the tokens that it was encoded after in an earlier
    prompt, as its blanks; None: what ``spec`` says, the same for all. ``spans`` are the positions
    that each chunk takes; None: as many as it has tokens.
    """
    if spec.num_learned and link_base is None:
        raise ValueError("this layout has link tokens: lay_out needs link_base (vocabulary size)")
    if spec.num_blanks and blank_id is None:
        raise ValueError("this layout has blanks (num_blanks): lay_out needs blank_id")
    if spec.bos != "none" and bos_id is None:
        raise ValueError(f"this layout has chunks with BOS (bos: {spec.bos}): lay_out needs bos_id")
    if contexts is None:
        blanks = sink_ids(spec, pieces.prefix, blank_id, bos_id)
        contexts = [blanks] * len(pieces.chunks)
    stored = [wrapped(chunk, spec, link_base, bos_id) for chunk in pieces.chunks]
    if spec.keeps_bos:
        pieces = pieces._replace(chunks=tuple((bos_id, *chunk) for chunk in pieces.chunks))
    if spec.bos == "keep-all":
        pieces = pieces._replace(query=(bos_id, *pieces.query))
    made = _to_prompt(list(_segments(pieces, spec, link_base or 0, contexts, spans)))
    chunks = tuple(zip(stored, contexts, strict=True)) if spec.block else ()
    return replace(made, prefix=pieces.prefix, chunks=chunks)


def sink_ids(spec: LayoutSpec, prefix: Ids, blank_id: int | None, bos_id: int | None) -> Ids:
    """Tokens that every chunk is encoded after and that are then hidden."""
    if spec.bos == "drop":
        return (bos_id,)
    return prefix if spec.shared_prefix else (blank_id,) * spec.num_blanks


def wrapped(chunk: Ids, spec: LayoutSpec, link_base: int | None, bos_id: int | None = None) -> Ids:
    """What is stored together: header, the chunk's own BOS, its tokens, trailer."""
    base = link_base or 0
    chunk = (bos_id, *chunk) if spec.keeps_bos else chunk
    if not spec.num_headers + spec.num_trailers:
        return chunk
    return _ids(base, spec.header_rows) + chunk + _ids(base, spec.trailer_rows)


class _Segment(NamedTuple):
    """A run of rows of one kind, contiguous in position and order."""

    ids: Ids
    kind: Kind
    position: int
    order: int
    chunk: int = NO_CHUNK
    group: int = GLOBAL


def _segments(
    pieces: Pieces,
    spec: LayoutSpec,
    base: int,
    contexts: Sequence[Ids],
    spans: Sequence[int] | None,
) -> Iterator[_Segment]:
    around = spec.num_headers + spec.num_trailers + spec.num_links
    lengths = [len(chunk) + around for chunk in pieces.chunks]
    starts, query_start = place(spec.placement, len(pieces.prefix), spans or lengths, spec.slot)
    yield _Segment(pieces.prefix, Kind.PREFIX, 0, 0)
    order, wraps = len(pieces.prefix), (_ids(base, spec.header_rows), _ids(base, spec.trailer_rows))
    for index, (chunk, blanks) in enumerate(zip(pieces.chunks, contexts, strict=True)):
        header, trailer = wraps
        body = [(blanks, Kind.BLANK), (header, Kind.WRAP), (chunk, Kind.CHUNK)]
        body.append((trailer, Kind.WRAP))
        links = [(_ids(base, spec.link_rows(index)), Kind.LINK)] if spec.num_links else []
        at, group = starts[index] - order, index if spec.block else GLOBAL
        for ids, kind in links + body if spec.link_side == "before" else body + links:
            back = len(ids) if kind == Kind.BLANK else 0
            own = GLOBAL if kind == Kind.LINK else group
            if ids:
                yield _Segment(ids, kind, at + order - back, order - back, index, own)
            order += len(ids) - back
    at = query_start - order
    for query, answer in ((pieces.query, pieces.answer), *pieces.followups):
        for ids, kind in ((query, Kind.QUERY), (answer, Kind.ANSWER)):
            yield _Segment(ids, kind, at + order, order)
            order += len(ids)


def _ids(base: int, rows: Iterable[int]) -> Ids:
    return tuple(base + row for row in rows)


def _to_prompt(segments: list[_Segment]) -> Prompt:
    ids, facts, lengths = [], [], [len(segment.ids) for segment in segments]
    for segment in segments:
        facts += (*segment[1:], len(ids))
        ids += segment.ids
    columns = tensor_of(facts).view(len(segments), -1).T.numpy()
    repeated = torch.from_numpy(np.repeat(columns, lengths, axis=1))  # torch's takes 20 times that
    kind, position, order, chunk, group, first = repeated[:, None]
    offset = torch.arange(len(ids)) - first
    layout = Layout(
        kind=kind,
        chunk=chunk,
        offset=offset,
        position=position + offset,
        order=order + offset,
        group=group,
        sample=torch.zeros_like(offset),
        supersedes=torch.full_like(offset, NO_ROW),
        until=torch.full_like(offset, FOREVER),
    )
    return Prompt(tuple(ids), layout)
