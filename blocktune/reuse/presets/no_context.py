"""The lower bound: the question alone."""

from dataclasses import dataclass
from typing import ClassVar

from blocktune.prompt import LayoutSpec
from blocktune.reuse.base import Cached, Method, register


@register("no-context")
@dataclass(frozen=True)
class NoContext(Method):
    """Answers without any chunk: what the model knows or guesses, the lower bound."""

    source: ClassVar[str] = "https://arxiv.org/abs/2603.20218"
    cached: ClassVar[Cached] = Cached.NOTHING
    keeps_context: ClassVar[bool] = False
    exact_on_one_chunk: ClassVar[bool] = False

    def arrange(self, spec: LayoutSpec) -> LayoutSpec:
        """Full attention over prefix and question."""
        return LayoutSpec(block=False)
