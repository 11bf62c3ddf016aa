"""Recompute the opening tokens of each chunk."""

from dataclasses import dataclass
from typing import ClassVar

from blocktune.methods.base import Method, register
from blocktune.methods.select import FirstK, Selection


@register("epic")
@dataclass(frozen=True)
class Epic(Method):
    """Computes the first tokens of every chunk afresh, which breaks its private attention sink.

    By count (``k``, the paper; ``k`` and ``last`` tokens, its code) or by share of the chunk
    (``share``, the matched budget of the study arXiv:2603.20218; ``last_share`` is the part of it
    that is taken from the chunk's end). Its scripts leave a BOS in every chunk, which the paper
    does not ask for; ``layout: {bos: keep}`` does that.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2410.15332"
    k: int = 16
    share: float | None = None
    last: int = 0
    last_share: float = 0.0

    def select(self) -> Selection:
        """The first tokens of each chunk, and maybe the last."""
        return FirstK(k=self.k, share=self.share, last=self.last, last_share=self.last_share)
