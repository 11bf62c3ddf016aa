"""Reuse methods: every way blocktune knows to answer from chunk caches, as compositions."""

from blocktune.reuse.base import Cached, Method, Weights, available, build, describe, register

__all__ = ["Cached", "Method", "Weights", "available", "build", "describe", "register"]
