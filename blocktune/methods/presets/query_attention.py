"""Attention from the question says which tokens are recomputed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from blocktune.methods.base import Method, register
from blocktune.methods.select import AuxiliaryAttention, QueryAttention, Selection
from blocktune.prompt import LayoutSpec


@register("query-attention")
@dataclass(frozen=True)
class QueryAttentionMethod(Method):
    """Computes the question over the reused cache, then recomputes the tokens that it attends to.

    The two stages of ProphetKV; how layers are fused (``fuse``) is not public.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2602.02579"
    ratio: float = 0.2
    fuse: str = "mean"

    def select(self) -> Selection:
        """Attention of the question over the reused cache."""
        return QueryAttention(ratio=self.ratio, fuse=self.fuse)


@register("cacheclip")
@dataclass(frozen=True)
class CacheClip(Method):
    """Recomputes windows of tokens that a small model's last layer attends to from the question.

    Chunks are encoded after the prompt's own prefix, all of it (the study arXiv:2603.20218 takes 1
    to 10 tokens). ``auxiliary`` is a folder or repository name
    of a model with the same tokenizer (Llama-3.2-1B for Llama-3.1-8B; Qwen3-0.6B for Qwen3-8B);
    ``self`` asks the served model, which costs a full prefill and is a bound, not a method.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2510.10129"
    ratio: float = 0.2
    auxiliary: str = "self"
    window: int = 8

    def layout(self, spec: LayoutSpec) -> LayoutSpec:
        """A shared prefix before every chunk."""
        return replace(spec, block=True, shared_prefix=True, num_blanks=0)

    def select(self) -> Selection:
        """Windows by the auxiliary model's attention."""
        return AuxiliaryAttention(ratio=self.ratio, model=self.auxiliary, window=self.window)
