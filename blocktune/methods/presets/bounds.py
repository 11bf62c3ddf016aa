"""Bounds and exact caches: what any reuse of chunks is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from blocktune.methods import (
    Cached,
    Everything,
    Method,
    Oracle,
    Random,
    Selection,
    register,
    require_count,
)
from blocktune.prompt import LayoutSpec


class _InFull(Method):
    """Full attention, whatever the adapter was trained for."""

    cached: ClassVar[Cached] = Cached.NOTHING

    def layout(self, spec: LayoutSpec) -> LayoutSpec:
        return LayoutSpec(block=False)


@register("full-prefill")
@dataclass(frozen=True)
class FullPrefill(_InFull):
    """Computes every token in full attention: the upper bound of accuracy and cost."""

    source: ClassVar[str] = "https://arxiv.org/abs/1706.03762"

    def select(self) -> Selection:
        return Everything()


@register("prefix-cache")
@dataclass(frozen=True)
class PrefixCache(_InFull):
    """Reuses the longest prefix seen before, in the same order: exact, but rarely hit in RAG.

    ``warm_up`` gives a single question a history: it first serves that many prompts of the same
    chunks, each rotated by one more place.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2312.07104"
    cached: ClassVar[Cached] = Cached.EXACT_PREFIX
    warm_up: int = 0

    def __post_init__(self):
        require_count("warm_up", self.warm_up)

    def select(self) -> Selection:
        return Everything()


@register("no-context")
@dataclass(frozen=True)
class NoContext(_InFull):
    """Answers without any chunk: what the model knows or guesses, the lower bound."""

    source: ClassVar[str] = "https://arxiv.org/abs/2603.20218"
    keeps_context: ClassVar[bool] = False
    exact_on_one_chunk: ClassVar[bool] = False


@register("oracle")
@dataclass(frozen=True)
class OracleMethod(Method):
    """Recomputes the tokens that matter most according to a full prefill run beforehand.

    ``by`` says how they are ranked: by ``influence``, ``attention`` or ``deviation``.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2603.20218"
    ratio: float = 0.15
    by: str = "influence"

    def select(self) -> Selection:
        return Oracle(ratio=self.ratio, by=self.by)


@register("random")
@dataclass(frozen=True)
class RandomMethod(Method):
    """Recomputes random tokens: what any other choice must beat."""

    source: ClassVar[str] = "https://arxiv.org/abs/2603.20218"
    ratio: float = 0.15
    seed: int = 0

    def select(self) -> Selection:
        return Random(ratio=self.ratio, seed=self.seed)
