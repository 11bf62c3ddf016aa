"""Exact prefix caching: what serving engines do today."""

from dataclasses import dataclass
from typing import ClassVar

from blocktune.methods.base import Cached, Method, register, require_count
from blocktune.methods.select import Everything, Selection
from blocktune.prompt import LayoutSpec


@register("prefix-cache")
@dataclass(frozen=True)
class PrefixCache(Method):
    """Reuses the longest prefix computed before, in the same order; exact, rarely a hit in RAG.

    ``warm_up`` gives a single question a history: so many prompts of the same chunks before it,
    each turned by one place more.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2312.07104"
    cached: ClassVar[Cached] = Cached.EXACT_PREFIX
    warm_up: int = 0

    def __post_init__(self):
        require_count("warm_up", self.warm_up)

    def layout(self, spec: LayoutSpec) -> LayoutSpec:
        """Full attention: only then is a prefix's state what a full prefill would make."""
        return LayoutSpec(block=False)

    def select(self) -> Selection:
        """Everything that the cached prefix does not hold."""
        return Everything()
