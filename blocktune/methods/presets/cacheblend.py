"""CacheBlend: recompute the tokens whose keys or values deviate most from a full prefill."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from blocktune.methods import Deviation, GradualDeviation, Method, Selection, register


@register("cacheblend")
@dataclass(frozen=True)
class CacheBlend(Method):
    """Computes layer 0 in full, then only the tokens whose keys deviate most at layer 1.

    This is the form of the study arXiv:2603.20218: one selection, by the distance of keys at
    ``check_layer``, for all later layers. For other forms see ``cacheblend-paper``,
    ``cacheblend-repo`` and ``cacheblend-lmcache``.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2405.16444"
    ratio: float = 0.15
    check_layer: int = 1

    def select(self) -> Selection:
        """Key deviation at the check layer."""
        return Deviation(ratio=self.ratio, check_layer=self.check_layer)


@register("cacheblend-lmcache")
@dataclass(frozen=True)
class CacheBlendLMCache(Method):
    """CacheBlend as in LMCache: squared key distance, and the share rounded down.

    The share is of all tokens that come from caches, a cached prefix included; the question is
    computed in full and does not count. ``sees_future`` reproduces the mask of LMCache's
    FlashAttention path, by which a recomputed token sees tokens after it (issue 1152 of the
    repository); its sparse path has the true mask. Do not serve with it. LMCache also stores a
    chunk as it first appeared inside some prompt (issue 922); here it is encoded alone.
    """

    source: ClassVar[str] = "https://github.com/LMCache/LMCache"
    ratio: float = 0.15
    check_layer: int = 1
    sees_future: bool = False

    def select(self) -> Selection:
        """Key deviation, squared."""
        return Deviation(
            ratio=self.ratio,
            check_layer=self.check_layer,
            squared=True,
            of="cached",
            sees_future=self.sees_future,
        )


@register("cacheblend-paper")
@dataclass(frozen=True)
class CacheBlendPaper(Method):
    """CacheBlend as in the paper: drops the least deviating tokens again at every layer.

    The mean share over the layers is ``ratio``. The paper does not say how it falls (``spread``).
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2405.16444"
    ratio: float = 0.15
    spread: float = 0.2
    check_layer: int = 1

    def select(self) -> Selection:
        """Deviation of keys and values, gradually."""
        return GradualDeviation(ratio=self.ratio, spread=self.spread, check_layer=self.check_layer)


@register("cacheblend-repo")
@dataclass(frozen=True)
class CacheBlendRepo(Method):
    """CacheBlend as in the authors' code: selects by squared value distance at layer 1.

    Layers 0 and 1 get fresh keys and values for all tokens. The share is of prefix and chunks,
    rounded down. ``sees_future`` reproduces the code's mask, by which a recomputed token sees
    tokens after it (issue 21 of the repository); do not serve with it. Not reproduced: in some of
    its scripts (suffix length 1) question tokens compete for the share and may stay stale, sliding
    windows are dropped, and every chunk is encoded after a BOS whose own state is dropped
    (``layout: {bos: drop}`` does that to any method).
    """

    source: ClassVar[str] = "https://github.com/YaoJiayi/CacheBlend"
    ratio: float = 0.16
    check_layer: int = 1
    sees_future: bool = False

    def select(self) -> Selection:
        """Value deviation; the check layer keeps the compared states."""
        return Deviation(
            ratio=self.ratio,
            check_layer=self.check_layer,
            by="values",
            squared=True,
            of="cached",
            keeps_keys=True,
            sees_future=self.sees_future,
        )
