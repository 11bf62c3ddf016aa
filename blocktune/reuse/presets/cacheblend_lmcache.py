"""CacheBlend as LMCache has it."""

from dataclasses import dataclass
from typing import ClassVar

from blocktune.reuse.base import Method, register
from blocktune.select import Deviation, Selection


@register("cacheblend-lmcache")
@dataclass(frozen=True)
class CacheBlendLMCache(Method):
    """Recomputes tokens whose keys deviate most; the question's tokens count in the share.

    Squared distance of rotated keys over all heads; a share of the whole prompt, rounded down,
    of which the question takes its part first: nothing is cached for it to agree with.
    """

    source: ClassVar[str] = "https://github.com/LMCache/LMCache"
    ratio: float = 0.15
    check_layer: int = 1

    def selection(self) -> Selection:
        """Key deviation, squared."""
        return Deviation(ratio=self.ratio, check_layer=self.check_layer, squared=True, of="prompt")
