"""Chunks between document markers, on weights that were trained for it."""

from dataclasses import dataclass, replace
from typing import ClassVar

from blocktune.prompt import LayoutSpec
from blocktune.reuse.base import Method, Weights, register

PLACEMENTS = {"reordered": "sequential", "composite": "composite"}


@register("turborag")
@dataclass(frozen=True)
class TurboRag(Method):
    """Plain reuse of chunks between document markers, on weights trained with block attention.

    The markers are the adapter's learned tokens, one before and one after each chunk.
    ``positions: reordered`` moves the chunks one after the other, ``composite`` leaves each
    where it was encoded, from 0.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2410.07590"
    weights: ClassVar[Weights] = Weights.WRAPS
    # Markers stand around the chunk; a full prefill has none.
    exact_on_one_chunk: ClassVar[bool] = False
    positions: str = "reordered"

    def __post_init__(self):
        if self.positions not in PLACEMENTS:
            known = " or ".join(PLACEMENTS)
            raise ValueError(f"positions must be {known}, got {self.positions!r}")

    def arrange(self, spec: LayoutSpec) -> LayoutSpec:
        """Chunks one after the other, or all from position 0."""
        return replace(spec, placement=PLACEMENTS[self.positions])
