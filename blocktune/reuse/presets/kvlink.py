"""Trained link tokens between reused chunks."""

from dataclasses import dataclass
from typing import ClassVar

from blocktune.reuse.base import Method, Weights, register


@register("kvlink")
@dataclass(frozen=True)
class KVLink(Method):
    """Plain reuse with trained link tokens beside each chunk, computed over all before them."""

    source: ClassVar[str] = "https://arxiv.org/abs/2502.16002"
    weights: ClassVar[Weights] = Weights.LINKS
    # Links stand between the chunk and the question; a full prefill has none.
    exact_on_one_chunk: ClassVar[bool] = False
