"""CacheBlend while its chunks are loading."""

from dataclasses import dataclass
from typing import ClassVar

from blocktune.methods import Deviation, Method, Selection, register


@register("cacheblend-pipelined")
@dataclass(frozen=True)
class CacheBlendPipelined(Method):
    """CacheBlend that loads a layer while it computes the one before, and recomputes meanwhile.

    ``ratio`` is the least share. Where loading a layer from the folder takes longer than
    recomputing that share of it, the controller recomputes as much as loading hides.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2405.16444"
    paced: ClassVar[bool] = True
    ratio: float = 0.15
    check_layer: int = 1

    def select(self) -> Selection:
        """Key deviation at the check layer."""
        return Deviation(ratio=self.ratio, check_layer=self.check_layer)
