"""CacheBlend as its authors' code has it."""

from dataclasses import dataclass
from typing import ClassVar

from blocktune.reuse.base import Method, register
from blocktune.select import Deviation, Selection


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

    def selection(self) -> Selection:
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
