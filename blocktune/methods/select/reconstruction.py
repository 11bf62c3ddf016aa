"""Selection for prompts that share parts: by attention in the first layer, or by recency."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from blocktune.layout import Layout
from blocktune.methods.registry import SELECTORS
from blocktune.methods.select.base import Scored, Selection, selectable
from blocktune.methods.select.budget import require_share, top_share
from blocktune.methods.select.passes import Passes

SOURCE = "https://arxiv.org/abs/2603.20218"


@SELECTORS.register("attention-deviation")
@dataclass(frozen=True)
class AttentionDeviation(Scored):
    """The tokens whose attention in the first layer changes most when they see other chunks.

    Attributes:
        ratio: Share of the context tokens, in [0, 1].

    Raises:
        ValueError: If the ratio is no share.

    Source: "selective reconstruction", one of the texts that blocktune began from, which gives no
    formula; ours is the total variation between a token's attention alone and in context.
    """

    source: ClassVar[str] = SOURCE
    ratio: float = 0.15

    def __post_init__(self):
        require_share("ratio", self.ratio)

    def begin(self, layout: Layout, passes: Passes) -> Tensor:
        """See `Selection.begin`."""
        scores, total = passes.outside_attention(), layout.is_context.sum(1)
        return top_share(scores, selectable(layout), total, self.ratio)


@SELECTORS.register("recency")
@dataclass(frozen=True)
class Recency(Selection):
    """The tokens that stand nearest to the question.

    Attributes:
        ratio: Share of the context tokens, in [0, 1].

    Raises:
        ValueError: If the ratio is no share.

    Source: "selective reconstruction", its heuristic by position.
    """

    source: ClassVar[str] = SOURCE
    ratio: float = 0.15

    def __post_init__(self):
        require_share("ratio", self.ratio)

    def start(self, layout: Layout) -> Tensor:
        """See `Selection.start`."""
        total = layout.is_context.sum(1)
        return top_share(layout.order, selectable(layout), total, self.ratio)
