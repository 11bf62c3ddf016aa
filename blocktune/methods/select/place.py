"""Selectors without a forward pass: by place in the chunk or the prompt, or at random."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from blocktune.methods.select.base import SELECTORS, Selection, selectable
from blocktune.methods.select.budget import chunk_sizes, share_count, top_of_context
from blocktune.registry import require_count, require_share

if TYPE_CHECKING:
    from torch import Tensor

    from blocktune.layout import Layout


@SELECTORS.register("first-k")
class FirstK(Selection):
    """The first ``k`` and the last ``last`` tokens of every chunk, or a share of each chunk."""

    source: ClassVar[str] = "https://arxiv.org/abs/2410.15332"  # both ends: its code, kvlink-a-b
    k: int = 16  # first tokens of each chunk; ignored if ``share`` is given
    share: float | None = None  # share of each chunk's tokens, rounded up, or None
    last: int = 0  # last tokens of each chunk; ignored if ``share`` is given
    last_share: float = 0.0  # part of ``share`` taken from the end of the chunk, in [0, 1]

    def __post_init__(self):
        require_count("k", self.k)
        require_count("last", self.last)
        require_share("share", 0 if self.share is None else self.share)
        require_share("last_share", self.last_share)

    def with_budget(self, ratio: float) -> Selection:
        return replace(self, share=ratio, k=type(self).k, last=type(self).last)

    def spends(self, num_layers: int) -> float | None:
        return self.share

    def start(self, layout: Layout) -> Tensor:
        length, first, last = chunk_length(layout), self.k, self.last
        if self.share is not None:
            total = share_count(length, self.share)
            last = share_count(total, self.last_share)
            first = total - last
        ends = (layout.offset < first) | (layout.offset >= length - last)
        return selectable(layout) & ends


@SELECTORS.register("recency")
class Recency(Selection):
    """The tokens closest to the question."""

    source: ClassVar[str] = "https://arxiv.org/abs/2603.20218"  # "selective reconstruction"
    ratio: float = 0.15

    def start(self, layout: Layout) -> Tensor:
        return top_of_context(layout.order, layout, self.ratio)


@SELECTORS.register("random")
class Random(Selection):
    """Random tokens: a lower bound for any choice.

    The draw depends on the seed and on the prompt's layout, but not on other prompts of the batch.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2603.20218"
    ratio: float = 0.15
    seed: int = 0

    def start(self, layout: Layout) -> Tensor:
        import torch

        def draw(key: int) -> Tensor:
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + key) % (1 << 62))
            # Drawn row by row, so that padding does not change the draws of the first rows.
            return torch.rand(layout.num_rows, generator=generator, dtype=torch.float64)

        keys = (layout.is_context * (layout.order + 1) * chunk_length(layout)).sum(1).tolist()
        scores = torch.stack([draw(key) for key in keys]).to(layout.device)
        return top_of_context(scores, layout, self.ratio)


def chunk_length(layout: Layout) -> Tensor:
    """Length in tokens of each row's chunk, ``(B, S)``; 0 outside of chunks."""
    return chunk_sizes(layout.chunk, layout.is_context) * layout.is_context
