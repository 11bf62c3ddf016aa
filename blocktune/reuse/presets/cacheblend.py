"""Recompute the tokens whose keys deviate most."""

from dataclasses import dataclass
from typing import ClassVar

from blocktune.reuse.base import Method, register
from blocktune.select import Deviation, Selection


@register("cacheblend")
@dataclass(frozen=True)
class CacheBlend(Method):
    """Computes the layers before the check layer in full, then the tokens whose keys deviate most.

    The form of the study arXiv:2603.20218: distance of keys at layer 1, one selection for all
    later layers. ``cacheblend-paper``, ``-repo`` and ``-lmcache`` are the other forms.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2405.16444"
    ratio: float = 0.15
    check_layer: int = 1

    def selection(self) -> Selection:
        """Key deviation at the check layer."""
        return Deviation(ratio=self.ratio, check_layer=self.check_layer)
