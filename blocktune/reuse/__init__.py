"""Reuse methods: every way blocktune knows to answer from chunk caches, as compositions."""

from blocktune.reuse.base import BOTH_LEARNED, Axis, Cached, Method, Weights, available, register
from blocktune.reuse.composition import Composition, compose
from blocktune.reuse.describe import describe
from blocktune.reuse.spoken import build, build_entry, parse_method

__all__ = [
    "BOTH_LEARNED",
    "Axis",
    "Cached",
    "Composition",
    "Method",
    "Weights",
    "available",
    "build",
    "build_entry",
    "compose",
    "describe",
    "parse_method",
    "register",
]
