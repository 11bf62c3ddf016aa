"""What a store found and did: one look-up, counters of each tier, counters of the whole."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from blocktune.cache.chunk_kv import Entry

Tier = Literal["memory", "cpu", "disk", "remote", "none"]


class Lookup(NamedTuple):
    """What one look into the store found, and what it took."""

    kv: Entry | None  # the chunk's entry, or None: encode it and `ChunkStore.put` it
    tier: Tier  # where it was found; ``"none"`` on a miss
    bytes_read: int  # bytes of keys, values and ids that the chunk has; 0 on a miss
    lookup_s: float  # seconds spent finding out whether it is there
    load_s: float  # seconds spent reading, verifying and moving it


@dataclass
class TierStats:
    """Counters of one tier since the store was opened.

    ``expired`` entries are also misses. ``unwritten`` ones could not be kept; ``failures`` are
    requests that the tier did not answer.
    """

    hits: int = 0
    misses: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    read_s: float = 0.0
    write_s: float = 0.0
    evictions: int = 0
    expired: int = 0
    unwritten: int = 0
    failures: int = 0


@dataclass
class StoreStats:
    """Counters since the store was opened.

    ``rejected`` entries (damaged, forged, of other tokens or another model) are also counted as
    misses; ``first_rejected`` says why the first was. ``unwritten`` ones could not be kept in the
    folder or the remote. ``tiers`` has the counters of each tier.
    """

    misses: int = 0
    rejected: int = 0
    first_rejected: str = ""
    memory_bytes: int = 0
    memory_chunks: int = 0
    tiers: dict[str, TierStats] = field(default_factory=dict)

    @property
    def memory_hits(self) -> int:
        """Hits in memory, of the device or the host."""
        return self._sum("hits", "memory", "cpu")

    @property
    def disk_hits(self) -> int:
        """Hits in the folder or the remote."""
        return self._sum("hits", "disk", "remote")

    @property
    def evictions(self) -> int:
        """Entries that left the memory of the device."""
        return self._sum("evictions", "memory")

    @property
    def unwritten(self) -> int:
        """Entries that the folder or the remote could not keep."""
        return self._sum("unwritten", "disk", "remote")

    @property
    def memory_bytes_read(self) -> int:
        """Bytes of the hits in memory."""
        return self._sum("bytes_read", "memory", "cpu")

    @property
    def disk_bytes_read(self) -> int:
        """Bytes of the hits in the folder or the remote."""
        return self._sum("bytes_read", "disk", "remote")

    @property
    def disk_bytes_written(self) -> int:
        """Bytes of the files that were written."""
        return self._sum("bytes_written", "disk", "remote")

    def _sum(self, name: str, *tiers: str) -> int:
        return sum(getattr(self.tiers[tier], name) for tier in tiers if tier in self.tiers)
