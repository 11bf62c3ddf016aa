"""SEL: a shared sink before every chunk, and attention to the few chunks that matter."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from blocktune.methods import Method, Reshape, TopChunks, register
from blocktune.prompt import LayoutSpec


@register("sel")
@dataclass(frozen=True)
class Sel(Method):
    """Encodes chunks after the shared prefix; the question sees only its top-scoring chunks.

    The paper's defaults for retrieved passages: two chunks, scores summed over heads and the
    question's tokens. A single chunk is always seen, so one chunk alone equals full prefill.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2412.16545"
    chunks: int = 2
    aggregation: str = "HT"

    def layout(self, spec: LayoutSpec) -> LayoutSpec:
        """Chunks after copies of the prefix."""
        return replace(spec, block=True, num_blanks=0, bos="none", shared_prefix=True)

    def reshape(self) -> Reshape:
        """Top chunks only."""
        return TopChunks(chunks=self.chunks, aggregation=self.aggregation)
