"""The question says which tokens matter."""

from dataclasses import dataclass
from typing import ClassVar

from blocktune.reuse.base import Method, register
from blocktune.select import QueryAttention, Selection


@register("query-attention")
@dataclass(frozen=True)
class QueryAttentionMethod(Method):
    """Computes the question over the reused cache, then recomputes the tokens that it attends to.

    The two stages of ProphetKV; how layers are fused (``fuse``) is not public.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2602.02579"
    ratio: float = 0.2
    fuse: str = "mean"

    def selection(self) -> Selection:
        """Attention of the question over the reused cache."""
        return QueryAttention(ratio=self.ratio, fuse=self.fuse)
