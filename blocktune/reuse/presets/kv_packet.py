"""Learned tokens around each chunk, on a base that was not trained."""

from dataclasses import dataclass
from typing import ClassVar

from blocktune.reuse.base import Method, Weights, register


@register("kv-packet")
@dataclass(frozen=True)
class KVPacket(Method):
    """Plain reuse of chunks that were encoded between a learned header and trailer.

    Header and trailer are stored with the chunk and seen like its tokens. The paper learns 8 and 8
    by distillation and leaves the base as it is.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2604.13226"
    weights: ClassVar[Weights] = Weights.WRAPS
    # Header and trailer stand around the chunk; a full prefill has none.
    exact_on_one_chunk: ClassVar[bool] = False
