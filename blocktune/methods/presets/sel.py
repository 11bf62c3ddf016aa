"""A shared sink before every chunk, and attention to the few chunks that matter."""

from dataclasses import dataclass, replace
from typing import ClassVar

from blocktune.methods.base import Method, register
from blocktune.methods.reshape import Reshape, TopChunks
from blocktune.prompt import LayoutSpec


@register("sel")
@dataclass(frozen=True)
class Sel(Method):
    """Encodes chunks after the shared prefix and lets the question see only its top chunks.

    Two chunks, their scores summed over heads and the question's tokens, are the paper's defaults
    for retrieved passages. One chunk is all there is to see, so alone it is a full prefill.
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
