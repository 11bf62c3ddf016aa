"""CacheBlend: recompute the tokens whose keys or values deviate most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from blocktune.methods.base import Method, register
from blocktune.methods.select import Deviation, GradualDeviation, Selection


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

    def select(self) -> Selection:
        """Key deviation at the check layer."""
        return Deviation(ratio=self.ratio, check_layer=self.check_layer)


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

    def select(self) -> Selection:
        """Key deviation, squared."""
        return Deviation(ratio=self.ratio, check_layer=self.check_layer, squared=True, of="prompt")


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

    def select(self) -> Selection:
        """Deviation of keys and values, gradually."""
        return GradualDeviation(ratio=self.ratio, spread=self.spread, check_layer=self.check_layer)


@register("cacheblend-repo")
@dataclass(frozen=True)
class CacheBlendRepo(Method):
    """Layers 0 and 1 get fresh states for all tokens, later ones where values deviate most.

    Squared distance of values at layer 1 over all heads, one selection, a share of prefix and
    chunks rounded down. ``sees_future`` reproduces the code's mask, by which a token that is
    recomputed sees tokens after it (issue 21 of the repository); never serve with it. Not
    reproduced: question tokens compete for the share and may stay stale in some of its scripts
    (a suffix length of 1), sliding windows are dropped, and every chunk is encoded after a BOS
    whose own state is dropped (``layout: {bos: drop}`` does that to any method).
    """

    source: ClassVar[str] = "https://github.com/YaoJiayi/CacheBlend"
    ratio: float = 0.16
    check_layer: int = 1
    sees_future: bool = False

    def select(self) -> Selection:
        """Value deviation; the check layer keeps what was made to judge by."""
        return Deviation(
            ratio=self.ratio,
            check_layer=self.check_layer,
            by="values",
            squared=True,
            of="cached",
            keeps_keys=True,
            sees_future=self.sees_future,
        )
