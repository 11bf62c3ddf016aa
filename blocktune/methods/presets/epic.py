"""EPIC (LegoLink): recompute the first tokens of each chunk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from blocktune.methods import FirstK, Method, Selection, register


@register("epic")
@dataclass(frozen=True)
class Epic(Method):
    """Recomputes the first tokens of every chunk, which removes the chunk's own attention sink.

    By number (``k``: the paper; ``k`` and ``last``: its code) or by share of the chunk (``share``:
    the equal budget of the study arXiv:2603.20218; ``last_share`` is the part of it taken from the
    end of the chunk). The authors' scripts also put a BOS before every chunk and before the
    question, which the paper does not ask for. ``layout: {bos: keep}`` does the first; a BOS
    before the question cannot be expressed.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2410.15332"
    k: int = 16
    share: float | None = None
    last: int = 0
    last_share: float = 0.0

    def select(self) -> Selection:
        """The first tokens of each chunk, and optionally the last."""
        return FirstK(k=self.k, share=self.share, last=self.last, last_share=self.last_share)
