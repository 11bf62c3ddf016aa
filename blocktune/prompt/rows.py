"""Lays token pieces out as the rows of a forward pass, by a `LayoutSpec`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from blocktune.layout import FOREVER, GLOBAL, NO_CHUNK, NO_ROW, Kind, Layout
from blocktune.positions import place
from blocktune.prompt.layout_spec import LayoutSpec
from blocktune.prompt.pieces import Ids, Pieces
from blocktune.prompt.special_tokens import TokenIds, int64

IGNORED = -100  # label of a row that carries no loss


@dataclass(frozen=True)
class Prompt:
    """One batch entry: token ids, their layout, and the units to store in a chunk cache."""

    input_ids: Tensor  # of every row, ``(S,)`` int64; link rows hold ``link_base + slot``
    layout: Layout  # ``(1, S)``
    prefix: Ids = ()
    chunks: tuple[tuple[Ids, Ids], ...] = ()  # tokens and their blanks; () in full attention

    @cached_property
    def ids(self) -> Ids:
        """``input_ids`` as a tuple."""
        return tuple(self.input_ids.tolist())


def lay_out(
    pieces: Pieces,
    spec: LayoutSpec,
    link_base: int | None = None,
    blank_id: int | None = None,
    bos_id: int | None = None,
    contexts: Sequence[Ids] | None = None,
    spans: Sequence[int] | None = None,
) -> Prompt:
    """Lays pieces out: prefix; blanks, tokens and links of each chunk; query, answer, followups.

    Headers and trailers are around a chunk's tokens, in its group. Links before a chunk come before
    its blanks. ``order`` counts the rows that are not blanks. If the first row of a chunk has order
    ``o`` and position ``s``, its ``p`` blanks have orders ``o - p ...`` and positions ``s - p
    ...``, in the group of the chunk.

    ``link_base``, ``blank_id`` and ``bos_id`` are the ids of the first learned token (such as the
    model's vocabulary size), of a blank and of BOS. Raises ValueError if the layout needs one that
    is missing. ``contexts`` are the blanks of each chunk, if these are tokens that it was encoded
    after in an earlier prompt; None: the blanks of ``spec``. ``spans`` are the positions that each
    chunk takes; None: its number of tokens.
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
    segments = list(_segments(pieces, spec, link_base or 0, contexts, spans))
    chunks = tuple(zip(stored, contexts, strict=True)) if spec.block else ()
    arrays = [s.ids.array if isinstance(s.ids, TokenIds) else int64(s.ids) for s in segments]
    ids = torch.from_numpy(np.concatenate(arrays))
    return Prompt(ids, _layout(segments), pieces.prefix, chunks)


def sink_ids(spec: LayoutSpec, prefix: Ids, blank_id: int | None, bos_id: int | None) -> Ids:
    """Tokens that every chunk is encoded after, and that are then hidden."""
    if spec.bos == "drop":
        return (bos_id,)
    return prefix if spec.shared_prefix else (blank_id,) * spec.num_blanks


def wrapped(chunk: Ids, spec: LayoutSpec, link_base: int | None, bos_id: int | None = None) -> Ids:
    """Tokens that are stored together: header, the chunk's own BOS, its tokens, trailer."""
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
    order = len(pieces.prefix)
    header, trailer = _ids(base, spec.header_rows), _ids(base, spec.trailer_rows)
    for index, (chunk, blanks) in enumerate(zip(pieces.chunks, contexts, strict=True)):
        body = [(chunk, Kind.CHUNK)]
        if header or trailer:
            body = [(header, Kind.WRAP), *body, (trailer, Kind.WRAP)]
        if blanks:
            body.insert(0, (blanks, Kind.BLANK))
        links = [(_ids(base, spec.link_rows(index)), Kind.LINK)] if spec.num_links else []
        at, group = starts[index] - order, index if spec.block else GLOBAL
        for ids, kind in links + body if spec.link_side == "before" else body + links:
            back = len(ids) if kind is Kind.BLANK else 0
            row_group = GLOBAL if kind is Kind.LINK else group
            if ids:
                yield _Segment(ids, kind, at + order - back, order - back, index, row_group)
            order += len(ids) - back
    at = query_start - order
    for query, answer in ((pieces.query, pieces.answer), *pieces.followups):
        for ids, kind in ((query, Kind.QUERY), (answer, Kind.ANSWER)):
            yield _Segment(ids, kind, at + order, order)
            order += len(ids)


def _ids(base: int, rows: Iterable[int]) -> Ids:
    return tuple(base + row for row in rows)


_OF_ALL = torch.tensor((0, NO_ROW, FOREVER))[:, None, None]
"""``sample``, ``supersedes`` and ``until`` of every row."""


def _layout(segments: list[_Segment]) -> Layout:
    lengths = [len(segment.ids) for segment in segments]
    firsts = accumulate(lengths, initial=0)
    facts = [(*segment[1:], first) for segment, first in zip(segments, firsts, strict=False)]
    columns = np.repeat(np.array(facts, dtype=np.int64).T, lengths, axis=1)  # 20 times faster than
    offset = columns[-1]  # torch; computed in place, because prompts are long
    np.subtract(np.arange(len(offset)), offset, out=offset)
    columns[1:3] += offset  # positions and orders
    kind, position, order, chunk, group, offset = torch.from_numpy(columns)[:, None].unbind()
    sample, supersedes, until = _OF_ALL.expand(3, 1, len(columns[0])).unbind()
    return Layout(kind, chunk, offset, position, order, group, sample, supersedes, until)
