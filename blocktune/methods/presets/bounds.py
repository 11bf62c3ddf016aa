"""Upper and lower bounds: full prefill, no context, and the best and a random choice of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from blocktune.methods.base import Cached, Method, register
from blocktune.methods.select import Everything, Oracle, Random, Selection
from blocktune.prompt import LayoutSpec


@register("full-prefill")
@dataclass(frozen=True)
class FullPrefill(Method):
    """Computes every token in full attention: the upper bound of accuracy and of cost."""

    source: ClassVar[str] = "https://arxiv.org/abs/1706.03762"
    cached: ClassVar[Cached] = Cached.NOTHING

    def layout(self, spec: LayoutSpec) -> LayoutSpec:
        """Full attention, whatever the adapter was trained for."""
        return LayoutSpec(block=False)

    def select(self) -> Selection:
        """Everything."""
        return Everything()


@register("no-context")
@dataclass(frozen=True)
class NoContext(Method):
    """Answers without any chunk: what the model knows or guesses, the lower bound."""

    source: ClassVar[str] = "https://arxiv.org/abs/2603.20218"
    cached: ClassVar[Cached] = Cached.NOTHING
    keeps_context: ClassVar[bool] = False
    exact_on_one_chunk: ClassVar[bool] = False

    def layout(self, spec: LayoutSpec) -> LayoutSpec:
        """Full attention over prefix and question."""
        return LayoutSpec(block=False)


@register("oracle")
@dataclass(frozen=True)
class OracleMethod(Method):
    """Recomputes the tokens that a full prefill, run first, shows to matter: no method knows more.

    ``by`` says what matters: ``influence``, ``attention`` or ``deviation``.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2603.20218"
    ratio: float = 0.15
    by: str = "influence"

    def select(self) -> Selection:
        """With a full prefill's knowledge."""
        return Oracle(ratio=self.ratio, by=self.by)


@register("random")
@dataclass(frozen=True)
class RandomMethod(Method):
    """Recomputes tokens drawn by chance: what any other choice must beat."""

    source: ClassVar[str] = "https://arxiv.org/abs/2603.20218"
    ratio: float = 0.15
    seed: int = 0

    def select(self) -> Selection:
        """A seeded draw."""
        return Random(ratio=self.ratio, seed=self.seed)
