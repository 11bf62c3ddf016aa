"""Plain reuse on a model that was trained for it."""

from dataclasses import dataclass
from typing import ClassVar

from blocktune.reuse.base import Method, Weights, register


@register("block-attention")
@dataclass(frozen=True)
class BlockAttention(Method):
    """Plain reuse on weights fine-tuned with block attention: nothing is recomputed."""

    source: ClassVar[str] = "https://arxiv.org/abs/2409.15355"
    weights: ClassVar[Weights] = Weights.BLOCK
