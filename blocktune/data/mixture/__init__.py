"""Mixtures: several sources, each with a weight and the attention that it is trained in."""

from blocktune.data.mixture.config import (
    BLOCK,
    FULL,
    MODES,
    Mixture,
    Part,
    load_mixture,
    parse_mixture,
)
from blocktune.data.mixture.draw import Mixed, MixedExample, PartCount, mix

__all__ = [
    "BLOCK",
    "FULL",
    "MODES",
    "Mixed",
    "MixedExample",
    "Mixture",
    "Part",
    "PartCount",
    "load_mixture",
    "mix",
    "parse_mixture",
]
