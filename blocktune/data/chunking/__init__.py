"""Chunkers: cut a long text or a conversation into pieces that are cached separately."""

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
