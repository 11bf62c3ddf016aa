"""CacheBlend as its paper has it: fewer tokens at every layer."""

from dataclasses import dataclass
from typing import ClassVar

from blocktune.reuse.base import Method, register
from blocktune.select import GradualDeviation, Selection


@register("cacheblend-paper")
@dataclass(frozen=True)
class CacheBlendPaper(Method):
    """Recomputes tokens whose states deviate, and drops the least deviating ones at every layer.

    The mean share over the layers is ``ratio``; how it falls (``spread``) is not in the paper.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2405.16444"
    ratio: float = 0.15
    spread: float = 0.2
    check_layer: int = 1

    def selection(self) -> Selection:
        """Deviation of keys and values, gradually."""
        return GradualDeviation(ratio=self.ratio, spread=self.spread, check_layer=self.check_layer)
