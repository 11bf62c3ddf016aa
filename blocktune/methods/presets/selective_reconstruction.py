"""Recompute what a partial match changes most."""

from dataclasses import dataclass
from typing import ClassVar

from blocktune.methods.base import Method, register
from blocktune.methods.select import AttentionDeviation, Recency, Selection

IMPACTS = {"attention": AttentionDeviation, "recency": Recency}


@register("selective-reconstruction")
@dataclass(frozen=True)
class SelectiveReconstruction(Method):
    """Recomputes tokens whose first-layer attention changes in context, or the most recent ones.

    ``impact`` says which: ``attention`` or ``recency``.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2603.20218"
    ratio: float = 0.15
    impact: str = "attention"

    def select(self) -> Selection:
        """By impact."""
        if self.impact not in IMPACTS:
            raise ValueError(f"impact must be {' or '.join(IMPACTS)}, got {self.impact!r}")
        return IMPACTS[self.impact](ratio=self.ratio)
