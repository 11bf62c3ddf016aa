"""The oracle: the whole prompt computed in full attention."""

from dataclasses import dataclass
from typing import ClassVar

from blocktune.prompt import LayoutSpec
from blocktune.reuse.base import Cached, Method, register
from blocktune.select import Everything, Selection


@register("full-prefill")
@dataclass(frozen=True)
class FullPrefill(Method):
    """Computes every token in full attention: the upper bound of accuracy and of cost."""

    source: ClassVar[str] = "https://arxiv.org/abs/1706.03762"
    cached: ClassVar[Cached] = Cached.NOTHING

    def arrange(self, spec: LayoutSpec) -> LayoutSpec:
        """Full attention, whatever the adapter was trained for."""
        return LayoutSpec(block=False)

    def selection(self) -> Selection:
        """Everything."""
        return Everything()
