"""Selectors that bound the value of any choice: a random one, and one that knows the answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from blocktune.methods.registry import SELECTORS
from blocktune.methods.select.base import Scored, Selection
from blocktune.methods.select.budget import require_share, top_of_context
from blocktune.methods.select.place import chunk_length

if TYPE_CHECKING:
    from torch import Tensor

    from blocktune.layout import Layout
    from blocktune.methods.select.passes import Passes, Truth

KNOWLEDGE = ("influence", "attention", "deviation")


@SELECTORS.register("random")
@dataclass(frozen=True)
class Random(Selection):
    """Random tokens: a lower bound for any choice.

    Attributes:
        ratio: Share of the context tokens, in [0, 1].
        seed: Of the draw, which also depends on the lengths of a prompt's pieces but not on the
            other prompts of a batch.

    Raises:
        ValueError: If the ratio is out of range.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2603.20218"
    ratio: float = 0.15
    seed: int = 0

    def __post_init__(self):
        require_share("ratio", self.ratio)

    def start(self, layout: Layout) -> Tensor:
        """See `Selection.start`."""
        import torch

        def draw(shape: int) -> Tensor:
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + shape) % (1 << 62))
            # Row by row: padding to a longer batch must not change what the first rows draw.
            return torch.rand(layout.num_rows, generator=generator, dtype=torch.float64)

        shapes = (layout.is_context * (layout.order + 1) * chunk_length(layout)).sum(1).tolist()
        scores = torch.stack([draw(shape) for shape in shapes]).to(layout.device)
        return top_of_context(scores, layout, self.ratio)


@SELECTORS.register("oracle")
@dataclass(frozen=True)
class Oracle(Scored):
    """Tokens chosen with the knowledge of a full prefill: an upper bound for any choice.

    Attributes:
        ratio: Share of the context tokens, in [0, 1].
        by: ``influence``: distance of the true values from the cached ones, weighted by the
            question's true attention; ``attention``: that attention alone; ``deviation``: distance
            of the true keys and values from the cached ones. Each is summed over the layers.

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
        return top_of_context(self._scores(passes.full_prefill()).sum(0), layout, self.ratio)

    def _scores(self, truth: Truth) -> Tensor:
        if self.by == "influence":
            return truth.query_attention * truth.value_deviation
        if self.by == "attention":
            return truth.query_attention
        return truth.key_deviation + truth.value_deviation
