"""Which rows a prompt has besides its tokens, and where its chunks stand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from blocktune.positions import PLACEMENTS
from blocktune.prompt.format import build_strict

LINK_SIDES = ("after", "before")


@dataclass(frozen=True)
class LayoutSpec:
    """How pieces become rows. Saved beside every adapter, so that it is served as trained.

    Attributes:
        block: Chunks see only themselves; False is full causal attention.
        num_links: Link tokens per chunk, which see everything before them.
        link_side: Where a chunk's links stand. KVLink: after.
        placement: Positions of the chunks: ``sequential`` contiguous (Block-Attention),
            ``parallel`` all from the end of the prefix (APE), ``composite`` all from 0 (TurboRAG).
        num_ghosts: Blank tokens a chunk is encoded after, then hidden (Link0).
        shared_prefix: Ghost copies of the prefix before every chunk (APE, CacheClip).

    Raises:
        ValueError: If a value is not accepted, or blanks, copies and full attention are mixed.
    """

    block: bool = True
    num_links: int = 0
    link_side: str = "after"
    placement: str = "sequential"
    num_ghosts: int = 0
    shared_prefix: bool = False

    def __post_init__(self):
        for name in ("block", "shared_prefix"):
            self._require(name, type(getattr(self, name)) is bool, "true or false")
        for name in ("num_links", "num_ghosts"):
            value = getattr(self, name)
            self._require(name, type(value) is int and value >= 0, "an integer of at least 0")
        self._require("link_side", self.link_side in LINK_SIDES, " or ".join(LINK_SIDES))
        self._require("placement", self.placement in PLACEMENTS, " or ".join(PLACEMENTS))
        if self.num_ghosts and self.shared_prefix:
            raise ValueError(
                "layout: chunks are encoded after blanks (num_ghosts) or after the "
                "prefix (shared_prefix), not both; drop one"
            )
        if not self.block and (self.num_ghosts or self.shared_prefix):
            raise ValueError(
                "layout: ghosts are hidden from other chunks, full attention "
                "(block: false) has none; drop num_ghosts and shared_prefix"
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
