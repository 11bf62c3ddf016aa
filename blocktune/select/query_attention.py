"""Selection by what the question looks at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from blocktune.layout import Layout
from blocktune.select.base import Scored, selectable
from blocktune.select.budget import require_share, top_share
from blocktune.select.passes import Passes
from blocktune.select.registry import SELECTORS

FUSIONS = ("mean", "max", "last")


@SELECTORS.register("query-attention")
@dataclass(frozen=True)
class QueryAttention(Scored):
    """The tokens that the question attends to most, when it is computed over the reused cache.

    Attributes:
        ratio: Share of the context tokens, in [0, 1].
        fuse: How the layers' scores become one: their ``mean``, their ``max``, or the ``last``
            layer's alone. The papers' formulas are not public.

    Raises:
        ValueError: If a value is out of range.

    Source: ProphetKV arXiv:2602.02579 (two stages, layers fused into one set).
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2602.02579"
    ratio: float = 0.15
    fuse: str = "mean"

    def __post_init__(self):
        require_share("ratio", self.ratio)
        if self.fuse not in FUSIONS:
            raise ValueError(f"fuse must be {', '.join(FUSIONS)}, got {self.fuse!r}")

    def begin(self, layout: Layout, passes: Passes) -> Tensor:
        """See `Selection.begin`."""
        layers = passes.query_attention()
        fused = {"mean": layers.mean(0), "max": layers.amax(0), "last": layers[-1]}[self.fuse]
        total = layout.is_context.sum(1)
        return top_share(fused, selectable(layout), total, self.ratio)
