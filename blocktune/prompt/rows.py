"""From token pieces to the rows of a forward pass, as a `LayoutSpec` says."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from blocktune.layout import FOREVER, GLOBAL, NO_CHUNK, NO_ROW, Kind, Layout
from blocktune.positions import PLACEMENTS, place
from blocktune.prompt.format import build_strict
from blocktune.prompt.pieces import Pieces

LINK_SIDES = ("after", "before")
LINK_TABLES = ("shared", "slot", "chunk")
BOS = ("none", "drop", "keep")
_COUNTS = ("num_links", "num_blanks", "max_chunks", "num_headers", "num_trailers", "slot")


@dataclass(frozen=True)
class LayoutSpec:
    """How pieces become rows. Saved beside every adapter, so that it is served as trained.

    Attributes:
        block: Chunks see only themselves; False is full causal attention.
        num_links: Link tokens per chunk, which see everything before them.
        link_side: Where a chunk's links stand. KVLink: after.
        link_table: Which links share a row of the table: all (``shared``), those of one slot
            (``slot``), or none, every slot of every chunk index having its own (``chunk``, the
            code of KVLink).
        max_chunks: Chunks that a table by ``chunk`` has rows for (KVLink: 40), else 0.
        num_headers: Learned tokens that open a chunk, encoded and cached with it (KV Packet: 8;
            TurboRAG's ``<|doc_start|>``: 1).
        num_trailers: Learned tokens that close it.
        placement: Positions of the chunks: ``sequential`` contiguous (Block-Attention),
            ``parallel`` all from the end of the prefix (APE), ``composite`` all from 0 (TurboRAG),
            ``reserved`` each at the start of a slot of ``slot`` positions (PromptCache).
        slot: Positions reserved for each chunk under ``reserved``, else 0.
        num_blanks: Blank tokens before each chunk while it is encoded, hidden afterwards (Link0).
        shared_prefix: Whether each chunk is encoded after a copy of the prefix, hidden afterwards
            (APE, CacheClip).
        bos: A chunk's own BOS: ``none``; ``drop``: encoded after one, then hidden (CacheBlend's
            code); ``keep``: stored and served as the chunk's first token (EPIC's code).

    The rows of the table of learned tokens are the links', then the headers', then the trailers'.

    Raises:
        ValueError: If a value is not accepted, or blanks, copies and full attention are mixed.
    """

    block: bool = True
    num_links: int = 0
    link_side: str = "after"
    placement: str = "sequential"
    num_blanks: int = 0
    shared_prefix: bool = False
    link_table: str = "slot"
    max_chunks: int = 0
    num_headers: int = 0
    num_trailers: int = 0
    slot: int = 0
    bos: str = "none"

    def __post_init__(self):
        for name in ("block", "shared_prefix"):
            self._require(name, type(getattr(self, name)) is bool, "true or false")
        for name in _COUNTS:
            value = getattr(self, name)
            self._require(name, type(value) is int and value >= 0, "an integer of at least 0")
        self._require("link_side", self.link_side in LINK_SIDES, " or ".join(LINK_SIDES))
        self._require("link_table", self.link_table in LINK_TABLES, " or ".join(LINK_TABLES))
        self._require("placement", self.placement in PLACEMENTS, " or ".join(PLACEMENTS))
        self._require("bos", self.bos in BOS, " or ".join(BOS))
        by_chunk = self.link_table == "chunk" and self.num_links > 0
        if by_chunk != (self.max_chunks > 0):
            raise ValueError(
                f"layout: a link table by chunk, and only that, needs max_chunks (KVLink: 40); got "
                f"num_links {self.num_links}, link_table '{self.link_table}' and max_chunks "
                f"{self.max_chunks}"
            )
        if (self.placement == "reserved") != (self.slot > 0):
            raise ValueError(
                f"layout: placement 'reserved', and only that, needs a slot (positions reserved "
                f"for a chunk); got placement '{self.placement}' and slot {self.slot}"
            )
        if len(self.sinks) > 1:
            raise ValueError(
                "layout: chunks are encoded after blanks (num_blanks), after the prefix "
                "(shared_prefix) or after a BOS (bos: drop), not after several; "
                f"drop all but one of {', '.join(self.sinks)}"
            )
        if not self.block and self.sinks:
            raise ValueError(
                "layout: blanks are hidden from other chunks, full attention "
                f"(block: false) has none; drop {', '.join(self.sinks)}"
            )

    @property
    def sinks(self) -> tuple[str, ...]:
        """Fields that put hidden rows before every chunk; at most one in a valid layout."""
        asked = {
            "num_blanks": self.num_blanks > 0,
            "shared_prefix": self.shared_prefix,
            "bos": self.bos == "drop",
        }
        return tuple(name for name, wanted in asked.items() if wanted)

    @property
    def num_learned(self) -> int:
        """Rows of the table of learned tokens; 0 where the layout has none."""
        return self._link_rows + self.num_headers + self.num_trailers

    @property
    def header_rows(self) -> range:
        """Table rows of the tokens that open a chunk."""
        return range(self._link_rows, self._link_rows + self.num_headers)

    @property
    def trailer_rows(self) -> range:
        """Table rows of the tokens that close a chunk."""
        return range(self._link_rows + self.num_headers, self.num_learned)

    def link_rows(self, chunk: int) -> tuple[int, ...]:
        """Table rows of the links of the ``chunk``-th chunk, slot by slot.

        Raises:
            ValueError: If the table goes by chunk and has no rows for this one.
        """
        if self.max_chunks and chunk >= self.max_chunks:
            raise ValueError(
                f"the link table has rows for {self.max_chunks} chunks (max_chunks), a prompt has "
                f"more; retrieve fewer, or train with link_table 'slot'"
            )
        first = chunk * self.num_links if self.link_table == "chunk" else 0
        step = 0 if self.link_table == "shared" else 1
        return tuple(first + step * slot for slot in range(self.num_links))

    @property
    def _link_rows(self) -> int:
        shared = min(1, self.num_links)
        return {"shared": shared, "slot": self.num_links}.get(
            self.link_table, self.num_links * self.max_chunks
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, every field."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LayoutSpec:
        """Inverse of `to_dict`; fields left out keep their default.

        Raises:
            ValueError: If a key is unknown or a value is not accepted.
        """
        return build_strict(cls, values, "layout")

    def _require(self, name: str, accepted: bool, wanted: str) -> None:
        if not accepted:
            raise ValueError(f"layout '{name}' must be {wanted}, got {getattr(self, name)!r}")


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
    pieces: Pieces,
    spec: LayoutSpec,
    link_base: int | None = None,
    blank_id: int | None = None,
    bos_id: int | None = None,
    contexts: Sequence[tuple[int, ...]] | None = None,
) -> Prompt:
    """Lays pieces out: prefix, per chunk its blanks, tokens and links, query, answer, followups.

    Headers and trailers stand around a chunk's tokens, in its group. Links that stand before a
    chunk come before its blanks. ``order`` counts the rows that are not blanks. If the first row of
    a chunk has order ``o`` and position ``s``, its ``p`` blanks have orders ``o - p ...`` and
    positions ``s - p ...``, in the group of the chunk.

    Args:
        pieces: Token ids, see `make_pieces`.
        spec: Which rows there are.
        link_base: Id of the first learned token, such as the model's vocabulary size.
        blank_id: Token id of a blank.
        bos_id: Token id of BOS.
        contexts: For each chunk the tokens that it was encoded after in an earlier prompt, as its
            blanks; None: what ``spec`` says, the same for all.

    Raises:
        ValueError: If the layout needs an id that was not given.
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
    if spec.bos == "keep":
        pieces = pieces._replace(chunks=tuple((bos_id, *chunk) for chunk in pieces.chunks))
    return _to_prompt(list(_segments(pieces, spec, link_base or 0, contexts)))


def sink_ids(
    spec: LayoutSpec, prefix: tuple[int, ...], blank_id: int | None, bos_id: int | None
) -> tuple[int, ...]:
    """Tokens that every chunk is encoded after and that are then hidden."""
    if spec.bos == "drop":
        return (bos_id,)
    return prefix if spec.shared_prefix else (blank_id,) * spec.num_blanks


def wrapped(
    chunk: tuple[int, ...], spec: LayoutSpec, link_base: int | None, bos_id: int | None = None
) -> tuple[int, ...]:
    """What is stored together: header, the chunk's own BOS, its tokens, trailer."""
    base = link_base or 0
    kept = (bos_id,) if spec.bos == "keep" else ()
    return _ids(base, spec.header_rows) + kept + chunk + _ids(base, spec.trailer_rows)


class _Segment(NamedTuple):
    """A run of rows of one kind, contiguous in position and order."""

    ids: tuple[int, ...]
    kind: Kind
    position: int
    order: int
    chunk: int = NO_CHUNK
    group: int = GLOBAL


def _segments(
    pieces: Pieces, spec: LayoutSpec, base: int, contexts: Sequence[tuple[int, ...]]
) -> Iterator[_Segment]:
    around = spec.num_headers + spec.num_trailers + spec.num_links
    lengths = [len(chunk) + around for chunk in pieces.chunks]
    starts, query_start = place(spec.placement, len(pieces.prefix), lengths, spec.slot)
    yield _Segment(pieces.prefix, Kind.PREFIX, 0, 0)
    order = len(pieces.prefix)
    for index, (chunk, blanks) in enumerate(zip(pieces.chunks, contexts, strict=True)):
        yield from _chunk_segments(index, chunk, spec, base, blanks, starts[index], order)
        order += lengths[index]
    at = 0
    for query, answer in ((pieces.query, pieces.answer), *pieces.followups):
        for ids, kind in ((query, Kind.QUERY), (answer, Kind.ANSWER)):
            yield _Segment(ids, kind, query_start + at, order + at)
            at += len(ids)


def _chunk_segments(
    index: int, chunk: tuple[int, ...], spec: LayoutSpec, base: int, blanks, start: int, order: int
) -> Iterator[_Segment]:
    group = index if spec.block else GLOBAL
    links = _Segment(_ids(base, spec.link_rows(index)), Kind.LINK, 0, 0, index)
    body = [
        _Segment(_ids(base, spec.header_rows), Kind.WRAP, 0, 0, index, group),
        _Segment(chunk, Kind.CHUNK, 0, 0, index, group),
        _Segment(_ids(base, spec.trailer_rows), Kind.WRAP, 0, 0, index, group),
    ]
    at = 0
    for segment in [links, *body] if spec.link_side == "before" else [*body, links]:
        if segment is body[0]:
            back = at - len(blanks)
            yield _Segment(blanks, Kind.BLANK, start + back, order + back, index, group)
        yield segment._replace(position=start + at, order=order + at)
        at += len(segment.ids)


def _ids(base: int, rows: Iterable[int]) -> tuple[int, ...]:
    return tuple(base + row for row in rows)


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
