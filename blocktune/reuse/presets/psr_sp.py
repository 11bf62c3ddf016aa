"""Of prefix, scale and recompute: all but recompute."""

from dataclasses import dataclass, replace
from typing import ClassVar

from blocktune.prompt import LayoutSpec
from blocktune.reshape import Reshape, ScaledContext
from blocktune.reuse.base import Method, register


@register("s+p")
@dataclass(frozen=True)
class SP(Method):
    """PSR's ablation S+P: encodes chunks after blanks and scales attention to them.

    Its text says Link0 with APE; chunks stand one after the other, as everywhere in the study.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2603.20218"
    # The chunk follows blanks and stays scaled, even alone; in a full prefill it does not.
    exact_on_one_chunk: ClassVar[bool] = False
    blanks: int = 1
    temperature: float = 0.9
    scale: float = 0.9

    def arrange(self, spec: LayoutSpec) -> LayoutSpec:
        """Chunks after blanks."""
        return replace(spec, block=True, shared_prefix=False, bos="none", num_ghosts=self.blanks)

    def reshape(self) -> Reshape:
        """A softmax of their own for the chunks."""
        return ScaledContext(temperature=self.temperature, scale=self.scale)
