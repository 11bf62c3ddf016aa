"""Prefix, scale and recompute: the study's own design."""

from dataclasses import dataclass, replace
from typing import ClassVar

from blocktune.prompt import LayoutSpec
from blocktune.reshape import Reshape, ScaledContext
from blocktune.reuse.base import Method, register
from blocktune.select import Deviation, Selection


@register("psr")
@dataclass(frozen=True)
class Psr(Method):
    """Encodes chunks after blanks, recomputes what deviates most and scales attention to the rest.

    Recomputed tokens are not scaled, and themselves see the reused ones scaled, as the question
    does. The study recomputes 15 % and tunes the rest on a grid without saying what it found: the
    defaults here are one blank, and the temperature and scale of APE's code.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2603.20218"
    # The chunk follows blanks and stays scaled, even alone; in a full prefill it does not.
    exact_on_one_chunk: ClassVar[bool] = False
    blanks: int = 1
    ratio: float = 0.15
    check_layer: int = 1
    temperature: float = 0.9
    scale: float = 0.9

    def arrange(self, spec: LayoutSpec) -> LayoutSpec:
        """Chunks after blanks."""
        return replace(spec, block=True, shared_prefix=False, bos="none", num_ghosts=self.blanks)

    def selection(self) -> Selection:
        """Key deviation at the check layer."""
        return Deviation(ratio=self.ratio, check_layer=self.check_layer)

    def reshape(self) -> Reshape:
        """A softmax of their own for reused tokens."""
        return ScaledContext(temperature=self.temperature, scale=self.scale)


@register("p+s+r")
@dataclass(frozen=True)
class Whole(Psr):
    """PSR by the name that it has among its own ablations: blanks, recompute and scale."""
