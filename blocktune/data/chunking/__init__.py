"""Chunkers: from a long text or a conversation to the pieces that are cached alone."""

from blocktune.data.chunking.base import (
    CHUNKERS,
    Chunker,
    Message,
    build_chunker,
    chunks_of,
    parse_chunker,
    tidy,
    trimmed,
)

__all__ = [
    "CHUNKERS",
    "Chunker",
    "Message",
    "build_chunker",
    "chunks_of",
    "parse_chunker",
    "tidy",
    "trimmed",
]
