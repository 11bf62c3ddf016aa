"""Synthetic multi-hop worlds in English: disjoint splits, bridges, chunks that need others."""

from blocktune.data.worlds.generate import (
    DEFAULT_KINDS,
    Context,
    WorldConfig,
    draw_context,
    generate_examples,
)
from blocktune.data.worlds.questions import MARKER, QUESTION_KINDS

__all__ = [
    "DEFAULT_KINDS",
    "MARKER",
    "QUESTION_KINDS",
    "Context",
    "WorldConfig",
    "draw_context",
    "generate_examples",
]
