"""Of prefix, scale and recompute: recompute alone."""

from dataclasses import dataclass
from typing import ClassVar

from blocktune.reuse.base import Method, register
from blocktune.select import Deviation, Selection


@register("r")
@dataclass(frozen=True)
class R(Method):
    """PSR's ablation R: recomputes the tokens whose keys deviate most, and nothing else."""

    source: ClassVar[str] = "https://arxiv.org/abs/2603.20218"
    ratio: float = 0.15
    check_layer: int = 1

    def selection(self) -> Selection:
        """Key deviation at the check layer."""
        return Deviation(ratio=self.ratio, check_layer=self.check_layer)
