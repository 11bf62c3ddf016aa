"""The layout of a prompt's pieces as rows, the same in training and serving."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import compress
from typing import Any

from blocktune.parsing import build_strict, check_types
from blocktune.positions.placement import PLACEMENTS
from blocktune.registry import require_count, require_one_of

BOS = ("none", "drop", "keep", "keep-all")
_CHOICES = {
    "link_side": ("after", "before"),
    "link_table": ("shared", "slot", "chunk"),
    "placement": PLACEMENTS,
    "bos": BOS,
}
_COUNTS = ("num_links", "num_blanks", "max_chunks", "num_headers", "num_trailers", "slot")


@dataclass(frozen=True)
class LayoutSpec:
    """How pieces become rows. It is saved with every adapter, so that it is served as trained.

    The table of learned tokens has rows for links, then headers, then trailers. ``link_table`` says
    which links share a row: all (``shared``), those of one slot (``slot``), or none (``chunk``, as
    in KVLink's code). ``bos`` is ``none``; ``drop``: each chunk is encoded after a BOS, which is
    then hidden (CacheBlend's code); ``keep``: BOS is stored and served as the chunk's first token;
    or ``keep-all``: the question gets one, too (EPIC's code). Raises ValueError if a value is not
    accepted, or fields exclude each other.
    """

    block: bool = True  # chunks see only themselves; False is full causal attention
    num_links: int = 0  # link tokens per chunk, which see everything before them
    link_side: str = "after"  # whether links come ``before`` or ``after`` their chunk (KVLink)
    placement: str = "sequential"  # see `blocktune.positions.place`
    num_blanks: int = 0  # blanks before each chunk at encoding, then hidden (Link0)
    shared_prefix: bool = False  # chunks are encoded after the prefix, then hidden (APE, CacheClip)
    link_table: str = "slot"  # which links share a row of the table
    max_chunks: int = 0  # chunks that a table by ``chunk`` has rows for (KVLink: 40), else 0
    num_headers: int = 0  # learned tokens that open a chunk, cached with it (KV Packet: 8)
    num_trailers: int = 0  # learned tokens that close a chunk, cached with it
    slot: int = 0  # positions reserved for each chunk under ``reserved``, else 0
    bos: str = "none"  # whether chunks get a BOS of their own

    def __post_init__(self):
        check_types(self, "layout")
        for name in _COUNTS:
            require_count(f"layout: '{name}'", getattr(self, name))
        for name, known in _CHOICES.items():
            require_one_of(f"layout: '{name}'", getattr(self, name), known)
        by_chunk = self.link_table == "chunk" and self.num_links > 0
        if by_chunk != (self.max_chunks > 0):
            raise ValueError(
                "layout: a link table by chunk needs max_chunks (KVLink: 40), others do not; got "
                f"num_links {self.num_links}, link_table '{self.link_table}' and max_chunks "
                f"{self.max_chunks}"
            )
        if (self.placement == "reserved") != (self.slot > 0):
            raise ValueError(
                "layout: only placement 'reserved' needs a slot (positions of a chunk); got "
                f"placement '{self.placement}' and slot {self.slot}"
            )
        if len(self.sinks) > int(self.block):
            raise ValueError(
                "layout: one of num_blanks, shared_prefix, bos: drop may put rows before chunks, "
                f"in full attention (block: false) none; got {', '.join(self.sinks)}"
            )

    @property
    def sinks(self) -> tuple[str, ...]:
        """Names of set fields that put hidden rows before every chunk; at most one is valid."""
        is_set = self.num_blanks > 0, self.shared_prefix, self.bos == "drop"
        return tuple(compress(("num_blanks", "shared_prefix", "bos"), is_set))

    @property
    def keeps_bos(self) -> bool:
        """Whether BOS is the first token of every chunk."""
        return self.bos in ("keep", "keep-all")

    @property
    def num_learned(self) -> int:
        """Number of rows of the table of learned tokens."""
        return self._link_rows + self.num_headers + self.num_trailers

    @property
    def header_rows(self) -> range:
        """Table rows of the headers, which open a chunk."""
        return range(self._link_rows, self._link_rows + self.num_headers)

    @property
    def trailer_rows(self) -> range:
        """Table rows of the trailers, which close a chunk."""
        return range(self._link_rows + self.num_headers, self.num_learned)

    def link_rows(self, chunk: int) -> tuple[int, ...]:
        """Table rows of the ``chunk``-th chunk's links, slot by slot. ValueError: it has none."""
        if self.max_chunks and chunk >= self.max_chunks:
            raise ValueError(
                f"the link table has rows for {self.max_chunks} chunks (max_chunks), but a prompt "
                "has more; retrieve fewer, or train with link_table 'slot'"
            )
        first = chunk * self.num_links if self.link_table == "chunk" else 0
        step = 0 if self.link_table == "shared" else 1
        return tuple(first + step * slot for slot in range(self.num_links))

    @property
    def _link_rows(self) -> int:
        rows = {"shared": min(1, self.num_links), "slot": self.num_links}
        return rows.get(self.link_table, self.num_links * self.max_chunks)

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LayoutSpec:
        """Inverse of `to_dict`; fields may be omitted. Raises ValueError for unknown keys."""
        return build_strict(cls, values, "layout")
