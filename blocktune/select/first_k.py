"""Selection by place: the opening tokens of each chunk."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from blocktune.layout import Layout
from blocktune.select.base import Selection, selectable
from blocktune.select.budget import require_share


@dataclass(frozen=True)
class FirstK(Selection):
    """The first ``k`` tokens of every chunk, or the first ``share`` of its tokens.

    Attributes:
        k: Tokens per chunk; ignored when ``share`` is given.
        share: Share of each chunk's tokens, rounded up, or None.

    Raises:
        ValueError: If a value is out of range.

    Source: EPIC / LegoLink, arXiv:2410.15332.
    """

    k: int = 16
    share: float | None = None

    def __post_init__(self):
        if type(self.k) is not int or self.k < 0:
            raise ValueError(f"k must be a number of tokens per chunk, at least 0, got {self.k!r}")
        if self.share is not None:
            require_share("share", self.share)

    def start(self, layout: Layout) -> Tensor:
        """See `Selection.start`."""
        if self.share is None:
            return selectable(layout) & (layout.offset < self.k)
        limit = torch.ceil(_chunk_length(layout).double() * self.share - 1e-9)
        return selectable(layout) & (layout.offset < limit)


def _chunk_length(layout: Layout) -> Tensor:
    """Tokens of the chunk that each row belongs to, ``(B, S)``; 0 for rows of no chunk."""
    slots = layout.chunk.clamp(min=0)
    counts = torch.zeros_like(slots).scatter_add(1, slots, layout.is_context.long())
    return counts.gather(1, slots) * layout.is_context
