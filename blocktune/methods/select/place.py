"""Selectors by place: the tokens at the ends of each chunk, or those nearest to the question."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from blocktune.methods.registry import SELECTORS
from blocktune.methods.select.base import Selection, selectable
from blocktune.methods.select.budget import require_share, share_count, top_of_context

if TYPE_CHECKING:
    from torch import Tensor

    from blocktune.layout import Layout


@SELECTORS.register("first-k")
@dataclass(frozen=True)
class FirstK(Selection):
    """The first ``k`` and the last ``last`` tokens of every chunk, or a share of each chunk.

    Attributes:
        k: First tokens of each chunk; ignored if ``share`` is given.
        share: Share of each chunk's tokens, rounded up, or None.
        last: Last tokens of each chunk; ignored if ``share`` is given.
        last_share: Part of ``share`` taken from the end of the chunk, in [0, 1].

    Raises:
        ValueError: If a value is out of range.

    Source: EPIC / LegoLink, arXiv:2410.15332; with both ends: its code, ``kvlink-a-b``.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2410.15332"
    k: int = 16
    share: float | None = None
    last: int = 0
    last_share: float = 0.0

    def __post_init__(self):
        for name in ("k", "last"):
            value = getattr(self, name)
            if type(value) is not int or value < 0:
                raise ValueError(
                    f"{name} must be a number of tokens per chunk, at least 0, got {value!r}"
                )
        if self.share is not None:
            require_share("share", self.share)
        require_share("last_share", self.last_share)

    def with_budget(self, ratio: float) -> Selection:
        """See `Selection.with_budget`: the same share of every chunk."""
        return replace(self, share=ratio)

    def spends(self, num_layers: int) -> float | None:
        """See `Selection.spends`."""
        return self.share

    def start(self, layout: Layout) -> Tensor:
        """See `Selection.start`."""
        length, first, last = chunk_length(layout), self.k, self.last
        if self.share is not None:
            total = share_count(length, self.share)
            last = share_count(total, self.last_share)
            first = total - last
        ends = (layout.offset < first) | (layout.offset >= length - last)
        return selectable(layout) & ends


@SELECTORS.register("recency")
@dataclass(frozen=True)
class Recency(Selection):
    """The tokens closest to the question.

    Attributes:
        ratio: Share of the context tokens, in [0, 1].

    Raises:
        ValueError: If the ratio is out of range.

    Source: "selective reconstruction", its heuristic by position.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2603.20218"
    ratio: float = 0.15

    def __post_init__(self):
        require_share("ratio", self.ratio)

    def start(self, layout: Layout) -> Tensor:
        """See `Selection.start`."""
        return top_of_context(layout.order, layout, self.ratio)


def chunk_length(layout: Layout) -> Tensor:
    """Tokens of the chunk that each row belongs to, ``(B, S)``; 0 for rows of no chunk."""
    slots = layout.chunk.clamp(min=0)
    counts = (slots * 0).scatter_add(1, slots, layout.is_context.long())
    return counts.gather(1, slots) * layout.is_context
