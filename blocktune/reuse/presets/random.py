"""The lower bound of what a choice of tokens is worth."""

from dataclasses import dataclass
from typing import ClassVar

from blocktune.reuse.base import Method, register
from blocktune.select import Random, Selection


@register("random")
@dataclass(frozen=True)
class RandomMethod(Method):
    """Recomputes tokens drawn by chance: what any other choice must beat."""

    source: ClassVar[str] = "https://arxiv.org/abs/2603.20218"
    ratio: float = 0.15
    seed: int = 0

    def selection(self) -> Selection:
        """A seeded draw."""
        return Random(ratio=self.ratio, seed=self.seed)
