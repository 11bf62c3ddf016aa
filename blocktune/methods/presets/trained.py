"""Reuse without recomputation, on weights that were trained for it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from blocktune.methods import Method, Weights, register
from blocktune.prompt import LayoutSpec


@register("block-attention")
@dataclass(frozen=True)
class BlockAttention(Method):
    """Reuses chunks without recomputation, on weights fine-tuned with block attention."""

    source: ClassVar[str] = "https://arxiv.org/abs/2409.15355"
    weights: ClassVar[Weights] = Weights.BLOCK


@register("kvlink")
@dataclass(frozen=True)
class KVLink(Method):
    """Adds trained link tokens to each chunk, computed in context; nothing else is recomputed."""

    source: ClassVar[str] = "https://arxiv.org/abs/2502.16002"
    weights: ClassVar[Weights] = Weights.LINKS
    # Links stand between the chunk and the question; a full prefill has none.
    exact_on_one_chunk: ClassVar[bool] = False


PLACEMENTS = {"reordered": "sequential", "composite": "composite"}


@register("turborag")
@dataclass(frozen=True)
class TurboRag(Method):
    """Reuses chunks encoded between trained document markers, without recomputation.

    The markers are the adapter's learned tokens, one before and one after each chunk.
    ``positions: reordered`` places the chunks one after another; ``composite`` leaves each where it
    was encoded, from position 0.
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

    def layout(self, spec: LayoutSpec) -> LayoutSpec:
        """Chunks one after another, or all from position 0."""
        return replace(spec, placement=PLACEMENTS[self.positions])


@register("kv-packet")
@dataclass(frozen=True)
class KVPacket(Method):
    """Reuses chunks encoded between a learned header and trailer, without recomputation.

    Header and trailer are stored with the chunk and seen like its tokens. The paper learns 8 tokens
    each by distillation and does not change the base model. Composed with a selector, a share of
    n tokens is rounded up; KV Packet's baselines round it down (``int(ratio * n)``).
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2604.13226"
    weights: ClassVar[Weights] = Weights.WRAPS
    # Header and trailer stand around the chunk; a full prefill has none.
    exact_on_one_chunk: ClassVar[bool] = False
