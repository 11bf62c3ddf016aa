"""Prompts: one way from text to token pieces, and from pieces to the rows of a forward pass."""

from blocktune.prompt.chunk import Chunk

__all__ = ["Chunk"]
