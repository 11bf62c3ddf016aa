"""What a store says of a look into it, and of its life."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from blocktune.cache.entry import Entry

Tier = Literal["memory", "disk", "none"]


class Lookup(NamedTuple):
    """What one look into the store found, and what it took.

    Attributes:
        kv: The chunk's entry, or None: encode it and `ChunkStore.put` it.
        tier: Where it was found; ``"none"`` on a miss.
        bytes_read: Bytes of keys, values and ids that the chunk has; 0 on a miss.
        lookup_s: Seconds spent finding out whether it is there.
        load_s: Seconds spent reading, verifying and moving it.
    """

    kv: Entry | None
    tier: Tier
    bytes_read: int
    lookup_s: float
    load_s: float


@dataclass
class StoreStats:
    """Counters since the store was opened. ``rejected`` ones are also counted as misses."""

    memory_hits: int = 0
    disk_hits: int = 0
    misses: int = 0
    rejected: int = 0
    evictions: int = 0
    memory_bytes_read: int = 0
    disk_bytes_read: int = 0
    disk_bytes_written: int = 0
    memory_bytes: int = 0
    memory_chunks: int = 0
