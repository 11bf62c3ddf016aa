"""Selectors that nobody would serve with: what a choice is worth, from below and from above."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from blocktune.layout import Layout
from blocktune.methods.registry import SELECTORS
from blocktune.methods.select.base import Scored, Selection, selectable
from blocktune.methods.select.budget import require_share, top_share
from blocktune.methods.select.first_k import chunk_length
from blocktune.methods.select.passes import Passes, Truth

KNOWLEDGE = ("influence", "attention", "deviation")


@SELECTORS.register("random")
@dataclass(frozen=True)
class Random(Selection):
    """Tokens drawn by chance: the lower bound of what a choice is worth.

    Attributes:
        ratio: Share of the context tokens, in [0, 1].
        seed: Of the draw, which depends on the lengths of a prompt's pieces too: prompts of one
            shape draw alike, whatever stands beside them in a batch.

    Raises:
        ValueError: If the ratio is no share.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2603.20218"
    ratio: float = 0.15
    seed: int = 0

    def __post_init__(self):
        require_share("ratio", self.ratio)

    def start(self, layout: Layout) -> Tensor:
        """See `Selection.start`."""
        shapes = (layout.is_context * (layout.order + 1) * chunk_length(layout)).sum(1).tolist()
        scores = [self._draw(shape, layout.num_rows) for shape in shapes]
        eligible, total = selectable(layout), layout.is_context.sum(1)
        return top_share(torch.stack(scores).to(layout.device), eligible, total, self.ratio)

    def _draw(self, shape: int, count: int) -> Tensor:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + shape) % (1 << 62))
        # Row by row: a longer batch must not change what the first rows draw.
        return torch.rand(count, generator=generator, dtype=torch.float64)


@SELECTORS.register("oracle")
@dataclass(frozen=True)
class Oracle(Scored):
    """Tokens chosen with a full prefill's knowledge: the upper bound of what a choice is worth.

    Attributes:
        ratio: Share of the context tokens, in [0, 1].
        by: ``influence``, how far the true values are from the cached ones, weighted by the
            question's true attention; ``attention``, that alone; ``deviation``, how far the true
            keys and values are from the cached ones. Each summed over the layers.

    Raises:
        ValueError: If a value is out of range.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2603.20218"
    needs_question: ClassVar[bool] = True
    ratio: float = 0.15
    by: str = "influence"

    def __post_init__(self):
        require_share("ratio", self.ratio)
        if self.by not in KNOWLEDGE:
            raise ValueError(f"by must be {', '.join(KNOWLEDGE)}, got {self.by!r}")

    def begin(self, layout: Layout, passes: Passes) -> Tensor:
        """See `Selection.begin`."""
        scores = self._scores(passes.full_prefill()).sum(0)
        return top_share(scores, selectable(layout), layout.is_context.sum(1), self.ratio)

    def _scores(self, truth: Truth) -> Tensor:
        if self.by == "influence":
            return truth.query_attention * truth.value_deviation
        if self.by == "attention":
            return truth.query_attention
        return truth.key_deviation + truth.value_deviation
