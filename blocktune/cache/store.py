"""Where encoded chunks are kept: in memory, least recently used first out, and in a folder."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from blocktune.cache.chunk_file import read_chunk, write_chunk
from blocktune.cache.chunk_kv import ChunkKV, Entry
from blocktune.cache.folder import ChunkFolder, chunk_path, is_taken, secret_from_environment

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
    """Counters since the store was opened.

    ``rejected`` entries (damaged, forged, of other tokens or another model) are also counted as
    misses; ``first_rejected`` says why the first was. ``unwritten`` ones could not be kept in the
    folder.
    """

    memory_hits: int = 0
    disk_hits: int = 0
    misses: int = 0
    rejected: int = 0
    first_rejected: str = ""
    unwritten: int = 0
    evictions: int = 0
    memory_bytes_read: int = 0
    disk_bytes_read: int = 0
    disk_bytes_written: int = 0
    memory_bytes: int = 0
    memory_chunks: int = 0


RETRY_S = 10.0
"""Seconds after a write that the disk refused in which nothing more is written."""
_LOG = logging.getLogger(__name__)


class ChunkStore:
    """Keeps entries of chunks under their keys, for several threads; processes may share a folder.

    A chunk's keys and values (`ChunkKV`) and the states that enter a layer (`ChunkStates`) are
    entries of their own; all share the memory.

    What is found is compared with what is wanted (token ids and fingerprint) before it is handed
    out. A file or entry that differs, or does not verify, is counted as ``rejected`` and answered
    as a miss; the `put` that follows replaces it. The first is logged as a
    warning, the others at level INFO.

    A folder that cannot be written serves what it holds. One warning says so, and what could not
    be kept is counted as ``unwritten``.

    Args:
        max_bytes: Memory for chunks, in bytes; 0 keeps none. Chunks that must leave memory stay
            in the folder, or are lost without one.
        folder: Every chunk put is also written here, one file each; None: memory only.
        device: Where chunks in memory live, and onto which those from the folder are loaded.
        secret: Key that signs the entries of the folder (HMAC-SHA-256): others are rejected.
            None: the environment's, see `blocktune.cache.folder.secret_from_environment`.
        must_write: Whether a folder that cannot be written is an error, as for `blocktune encode`.

    Attributes:
        warn_rejected: Whether the first rejected entry is a warning; the others are level INFO.
        notes: What plug-ins remember of this store while the process lives, by keys of their own.

    Raises:
        ValueError: If there is nowhere to keep anything, the folder is none, or the key is too
            short; with ``must_write`` also if the folder cannot be written.
    """

    def __init__(
        self,
        max_bytes: int = 4 << 30,
        folder: str | Path | None = None,
        device: torch.device | str = "cpu",
        *,
        secret: bytes | None = None,
        must_write: bool = False,
    ):
        if max_bytes < 0 or (max_bytes == 0 and folder is None):
            raise ValueError(
                f"a chunk store needs memory or a folder; got {max_bytes} bytes, folder {folder}"
            )
        self.max_bytes = max_bytes
        self.folder = None if folder is None else Path(folder)
        self.device = torch.device(device)
        self.notes: dict[Hashable, Any] = {}
        self._chunks: OrderedDict[str, Entry] = OrderedDict()
        self._stats = StoreStats()
        self._lock = threading.RLock()
        self.must_write, self.warn_rejected = must_write, True
        self._files, self._next_write, self._warned = None, 0.0, False
        if folder is not None:
            self._files = ChunkFolder(
                folder, secret_from_environment() if secret is None else secret
            )
            try:
                self._files.prepare()
            except OSError as error:
                self._unwritten(error)

    def get(
        self,
        key: str,
        token_ids: Sequence[int] | Tensor,
        fingerprint: str,
        kind: type[Entry] = ChunkKV,
    ) -> Entry | None:
        """The entry stored under ``key``, or None; see `lookup`."""
        return self.lookup(key, token_ids, fingerprint, kind).kv

    def lookup(
        self,
        key: str,
        token_ids: Sequence[int] | Tensor,
        fingerprint: str,
        kind: type[Entry] = ChunkKV,
        *,
        read: Callable[[ChunkFolder, str, type[Entry]], Entry] = read_chunk,
        keep: bool = True,
    ) -> Lookup:
        """Looks for a chunk and says where it was and how long that took.

        Args:
            key: From `chunk_key` or `states_key`.
            token_ids: The tokens it must hold, ``(S,)``.
            fingerprint: The model it must come from, `model_fingerprint`.
            kind: What the entry must be.
            read: Reads it from the folder, raising what `read_chunk` raises.
            keep: Whether what was read is kept in memory.
        """
        started = time.perf_counter()
        with self._lock:
            kv = self._chunks.get(key)
            if kv is not None and self._accept(kv, key, token_ids, fingerprint, kind):
                self._chunks.move_to_end(key)
                self._stats.memory_hits += 1
                self._stats.memory_bytes_read += kv.num_bytes
                return Lookup(kv, "memory", kv.num_bytes, time.perf_counter() - started, 0.0)
        found = time.perf_counter()
        # Outside the lock: a slow disk must not stop hits in memory.
        kv = self._read(key, token_ids, fingerprint, kind, read)
        loaded = time.perf_counter()
        with self._lock:
            if kv is None:
                self._stats.misses += 1
                return Lookup(None, "none", 0, loaded - started, 0.0)
            self._stats.disk_hits += 1
            self._stats.disk_bytes_read += kv.num_bytes
            if keep:
                self._remember(key, kv)
        return Lookup(kv, "disk", kv.num_bytes, found - started, loaded - found)

    def put(self, key: str, kv: Entry) -> None:
        """Keeps a chunk, in the folder first, then in memory; replaces what was there.

        Raises:
            ValueError: If it is larger than the memory allowed and there is no folder, or, with
                ``must_write``, if the folder cannot be written.
        """
        if self.folder is None and kv.num_bytes > self.max_bytes:
            raise ValueError(
                f"a chunk of {kv.num_tokens} tokens takes {kv.num_bytes:,} bytes, the store may "
                f"hold {self.max_bytes:,}; allow more memory or give the store a folder"
            )
        kept = kv.to(self.device).compact()
        written = self._write(key, kept)
        with self._lock:
            self._stats.disk_bytes_written += written
            self._remember(key, kept)

    def discard(self, key: str) -> None:
        """Drops the entry of ``key``, if there is one, in memory and in the folder."""
        with self._lock:
            self._forget(key)
        try:
            if self._files is not None:
                self._files.remove(key)
        except OSError as error:
            self._unwritten(error)

    def describe(self, fingerprint: str, make: Callable[[], dict[str, Any]]) -> None:
        """Writes the manifest of a model into the folder, unless it holds one.

        Args:
            fingerprint: The model's.
            make: Makes the manifest, see `blocktune.cache.manifest`; called if it is missing.
        """
        if self._files is None or time.monotonic() < self._next_write:
            return
        try:
            known = self._files.manifest(fingerprint) is not None
        except (OSError, ValueError):
            known = False  # damaged, or not signed: written again
        try:
            if not known:
                self._files.write_manifest(make())
        except OSError as error:
            self._unwritten(error)

    def clear(self) -> None:
        """Empties the memory; a folder keeps its files."""
        with self._lock:
            for key in list(self._chunks):
                self._forget(key)

    def stats(self) -> StoreStats:
        """A copy of the counters."""
        with self._lock:
            return replace(self._stats, memory_chunks=len(self._chunks))

    def __contains__(self, key: str) -> bool:
        """Whether there is an entry of ``key``; only `get` verifies it."""
        with self._lock:
            in_memory = key in self._chunks
        return in_memory or (self._files is not None and self._files.has(key))

    def __len__(self) -> int:
        """Chunks in memory or in the folder, each counted once."""
        files = () if self._files is None else self._files.keys()
        with self._lock:
            return len({*self._chunks, *files})

    def remember(self, key: str, kv: Entry) -> None:
        """Keeps in memory what was read from the folder."""
        with self._lock:
            self._remember(key, kv)

    def _read(self, key: str, token_ids, fingerprint: str, kind, read) -> Entry | None:
        if self._files is None:
            return None
        try:
            kv = read(self._files, key, kind).to(self.device)
        except FileNotFoundError:
            return None
        except ValueError as error:
            self._reject(f"{chunk_path(self.folder, key)}: {error}")
            return None
        if not self._accept(kv, key, token_ids, fingerprint, kind):
            return None
        self._files.touch(key)
        return kv

    def _accept(self, kv: Entry, key: str, token_ids, fingerprint: str, kind: type[Entry]) -> bool:
        if kv.kind == kind.kind and kv.matches(token_ids, fingerprint):
            return True
        what = "model" if kv.fingerprint != fingerprint else "tokens"
        what = what if kv.kind == kind.kind else "kind of entry"
        self._reject(f"{key[:12]}: it holds other {what} than wanted")
        return False

    def _reject(self, reason: str) -> None:
        reason = reason.replace("\n", " ")
        with self._lock:
            self._stats.rejected += 1
            first = self.warn_rejected and not self._stats.first_rejected
            self._stats.first_rejected = self._stats.first_rejected or reason
        level = logging.WARNING if first else logging.INFO
        more = "; more are counted, and named at level INFO" if first else ""
        _LOG.log(level, "cached chunk not used, it is encoded again: %s%s", reason, more)

    def _write(self, key: str, kv: Entry) -> int:
        if self._files is None:
            return 0
        if self.must_write or time.monotonic() >= self._next_write:
            try:
                return write_chunk(self._files, key, kv)
            except OSError as error:
                self._unwritten(error)
        with self._lock:
            self._stats.unwritten += 1
        return 0

    def _unwritten(self, error: OSError) -> None:
        """Says once that nothing is kept, and stops trying for a while if the disk refuses all."""
        reason = f"cannot write to the store '{self.folder}': {error.strerror or error}"
        if self.must_write:
            raise ValueError(f"{reason}; free space there or choose another store") from None
        with self._lock:
            if not is_taken(error):
                self._next_write = time.monotonic() + RETRY_S
            warned, self._warned = self._warned, True
        if not warned:
            lost = "a chunk is" if is_taken(error) else "new chunks are"
            _LOG.warning("%s; what it holds is used, %s not kept there", reason, lost)

    def _remember(self, key: str, kv: Entry) -> None:
        self._forget(key)
        if kv.num_bytes > self.max_bytes:
            return  # it is in the folder: `put` refuses such chunks without one
        while self._stats.memory_bytes + kv.num_bytes > self.max_bytes:
            self._forget(next(iter(self._chunks)))
            self._stats.evictions += 1
        self._chunks[key] = kv
        self._stats.memory_bytes += kv.num_bytes

    def _forget(self, key: str) -> None:
        old = self._chunks.pop(key, None)
        if old is not None:
            self._stats.memory_bytes -= old.num_bytes
