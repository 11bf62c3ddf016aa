"""Methods that choose tokens by attention: of the question, or of the tokens themselves."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from blocktune.methods import (
    AttentionDeviation,
    AuxiliaryAttention,
    Method,
    QueryAttention,
    Recency,
    Selection,
    register,
)
from blocktune.prompt import LayoutSpec


@register("query-attention")
@dataclass(frozen=True)
class QueryAttentionMethod(Method):
    """Computes the question over the reused cache, then recomputes the tokens it attends to.

    These are the two stages of ProphetKV; how it combines layers (``fuse``) is not public.
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
    """Recomputes windows of tokens that the question attends to in a small auxiliary model.

    Chunks are encoded after the whole prefix of the prompt (the study arXiv:2603.20218 takes 1 to
    10 tokens of it). ``auxiliary`` is a folder or repository name of a model with the same
    tokenizer (Llama-3.2-1B for Llama-3.1-8B; Qwen3-0.6B for Qwen3-8B). ``self`` asks the served
    model, which costs a full prefill: a bound, not a method.
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


IMPACTS = {"attention": AttentionDeviation, "recency": Recency}


@register("selective-reconstruction")
@dataclass(frozen=True)
class SelectiveReconstruction(Method):
    """Recomputes tokens whose first-layer attention changes in context, or the most recent ones.

    ``impact`` says which: ``attention`` or ``recency``.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2603.20218"
    ratio: float = 0.15
    impact: str = "attention"

    def select(self) -> Selection:
        """By impact."""
        if self.impact not in IMPACTS:
            raise ValueError(f"impact must be {' or '.join(IMPACTS)}, got {self.impact!r}")
        return IMPACTS[self.impact](ratio=self.ratio)
