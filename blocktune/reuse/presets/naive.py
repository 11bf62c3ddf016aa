"""Plain reuse."""

from dataclasses import dataclass
from typing import ClassVar

from blocktune.reuse.base import Method, register


@register("naive")
@dataclass(frozen=True)
class Naive(Method):
    """Joins chunk caches, moved to their positions, and computes only the question."""

    source: ClassVar[str] = "https://arxiv.org/abs/2311.04934"
