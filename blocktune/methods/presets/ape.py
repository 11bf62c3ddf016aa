"""APE: chunks side by side, attended to with a temperature and a scale."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from blocktune.methods import Method, Reshape, ScaledContext, register
from blocktune.prompt import LayoutSpec


@register("ape")
@dataclass(frozen=True)
class Ape(Method):
    """Encodes chunks after a shared prefix at the same positions; scales attention to them.

    Every chunk is encoded after the prompt's prefix, whose keys are kept once, and starts where
    the prefix ends. The question and each answer token attend to the chunks with a temperature and
    a scale. The defaults, 0.9 and 0.9, are those of the authors' code; the paper searches a grid.
    ``positions: sequential`` places the chunks one after another, as the study arXiv:2603.20218.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2502.05431"
    # Attention to the chunk is scaled even if it is alone.
    exact_on_one_chunk: ClassVar[bool] = False
    temperature: float = 0.9
    scale: float = 0.9
    positions: str = "parallel"

    def __post_init__(self):
        if self.positions not in ("parallel", "sequential"):
            raise ValueError(f"positions must be parallel or sequential, got {self.positions!r}")

    def layout(self, spec: LayoutSpec) -> LayoutSpec:
        """Chunks after copies of the prefix, all at one place unless sequential."""
        spec = replace(spec, block=True, num_blanks=0, bos="none", shared_prefix=True)
        return replace(spec, placement=self.positions, slot=0)

    def reshape(self) -> Reshape:
        """A softmax of their own for the chunks."""
        return ScaledContext(temperature=self.temperature, scale=self.scale)
