"""The chunk store: encoded chunks in device memory, host memory, a folder and a remote."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch

from blocktune.cache.chunk_kv import ChunkKV, Entry, Ids, Lookup
from blocktune.cache.store.chunk_file import ChunkFile, pack_chunk
from blocktune.cache.store.codecs import round_trip
from blocktune.cache.store.config import MEMORY, StoreConfig, StoreStats, Tracer, keep_latest
from blocktune.cache.store.ledger import About, Ledger, Row
from blocktune.cache.store.shelf import open_places
from blocktune.cache.store.tiers import BlobTier, MemoryTier
from blocktune.positions import RopeSpec

_LOG = logging.getLogger(__name__)
_TENANTS, _NOTED = 1024, 64  # tenants whose RoPE frequencies, and plug-ins' data, are remembered


class ChunkStore:
    """Thread-safe store of chunk entries by key. Several processes may share a folder.

    A lookup asks device, host, folder and remote, in this order, and moves a hit up to the device.
    A new entry is written to the device, the folder and, in the background (`flush`), the remote.
    Entries evicted from the device go to the host. A tier out of reach is skipped. An entry that
    does not verify, or of other tokens or another model, is a miss, counted as ``rejected``.

    Raises ValueError if there is neither memory nor a folder, the folder is not a folder, or the
    signing key is too short; with ``must_write`` also if the folder cannot be written.
    """

    def __init__(
        self,
        max_bytes: int = MEMORY,  # memory for chunks; 0: keep none in memory
        folder: str | Path | None = None,  # gets every chunk that is put, one file each
        device: torch.device | str = "cpu",  # where chunks in memory live
        *,
        secret: bytes | None = None,  # signs the files; None: `secret_from_environment`
        must_write: bool = False,  # whether a folder that cannot be written is an error
        config: StoreConfig | None = None,  # all limits, in place of ``max_bytes`` and ``folder``
    ):
        config = config or StoreConfig(folder=folder and Path(folder), memory=max_bytes)
        self.config, self.folder, self.place = config, config.folder, config.place
        self.device = torch.device(device)
        self.notes: dict[Hashable, Any] = {}  # plug-ins' data, until `clear`
        self.may_load = True  # whether a method may load any model, from folders and the Hub
        self._tenants_notes: dict[Hashable, Any] = {}
        self.warn_rejected = True  # whether the first one is a warning
        self._stats, self._lock = StoreStats(), threading.RLock()
        self._ropes: dict[str, RopeSpec] = {}  # by fingerprint of a model
        self._shared_ropes: dict[str, RopeSpec] = {}  # by that of a tenant
        self._tracer = Tracer(config.trace)
        self._memories = [MemoryTier("memory", self.device, config)]
        self._memories += [MemoryTier("cpu", torch.device("cpu"), config)] if config.cpu else []
        self._blobs = [BlobTier(b, config, must_write) for b in open_places(config, secret)]
        self._folders = self._blobs[: self.folder is not None]

    @classmethod
    def open(cls, text: str | Path, device: torch.device | str = "cpu", **options) -> Self:
        """Opens a store from a text such as ``chunks/,disk=50GB``, see `StoreConfig.parse`."""
        return cls(device=device, config=StoreConfig.parse(text), **options)

    def __reduce__(self):
        raise ValueError("a ChunkStore, or its Engine, cannot be pickled; open it in each process")

    def get(
        self, key: str, token_ids: Ids, fingerprint: str, kind: type[Entry] = ChunkKV
    ) -> Entry | None:
        """The entry stored under ``key``, or None; see `lookup`."""
        return self.lookup(key, token_ids, fingerprint, kind).kv

    def lookup(
        self,
        key: str,
        token_ids: Ids,
        fingerprint: str,
        kind: type[Entry] = ChunkKV,
        *,
        read: Callable[[ChunkFile], Entry] = ChunkFile.entry,
        keep: bool = True,
        in_memory: bool = True,
    ) -> Lookup:
        """Looks up an entry. Returns it with the tier where it was found and the time taken.

        ``read`` reads its file, with the errors of `ChunkFile.read`; ``keep`` keeps it in memory.
        Without ``in_memory``, only the folder is looked up, whose files others may have replaced.
        """
        started = time.perf_counter()
        rejected: set[str] = set()
        wanted = key, token_ids, fingerprint, kind, rejected
        with self._lock:
            for tier in self._memories if in_memory else ():
                kv = tier.get(key)
                if kv is not None and self._accept(kv, *wanted):
                    if tier.name != "memory":
                        self._remember(key, kv, tier.ledger.row(key))
                        kv = self._memories[0].entries.get(key) or kv.to(self.device)
                    self._memories[0].ledger.use(key)
                    return self._hit(key, kv, tier, started, time.perf_counter())
                tier.stats.misses += 1
        searched = time.perf_counter()
        # Outside the lock: a slow disk must not stop hits in memory.
        for tier in self._blobs if in_memory else self._folders:
            loaded = None
            try:
                loaded = tier.load(key, kind, lambda file: read(file).to(self.device))
            except ValueError as error:
                self._reject(f"{tier.blobs.name(key)}: {error}", rejected)
            if loaded is None or not self._accept(loaded[0], *wanted):
                with self._lock:
                    tier.stats.misses += 1
                continue
            kv, row, data = loaded
            tier.used(row)
            if data is not None and tier is not self._blobs[0]:
                self._blobs[0].save(key, lambda data=data: data, row)
            with self._lock:
                if keep:
                    self._remember(key, kv, row)
                return self._hit(key, kv, tier, started, searched)
        seconds = time.perf_counter() - started
        with self._lock:
            if in_memory:  # else it is the second look-up of the same
                self._stats.misses += 1
                self._tracer.looked_up(key, len(token_ids), "none", 0, seconds)
        return Lookup(None, "none", 0, seconds, 0.0, "; ".join(sorted(rejected)))

    def stored(
        self, key: str, token_ids: Ids, fingerprint: str, kind: type[Entry] = ChunkKV
    ) -> Row | None:
        """The row of an entry's file in the folder, else the remote, or None. No tensor is read."""
        for tier in self._blobs[:1]:
            with suppress(ValueError):  # damaged, or ``most`` was too little: `lookup` reads all
                found = tier.load(key, kind, lambda file: file, most=1 << 20)
                if found is not None and found[0].matches(token_ids, fingerprint):
                    tier.used(found[1])
                    return found[1]
        return None

    def put(self, key: str, kv: Entry, *, keep: bool = True, **facts: Any) -> Entry:
        """Stores an entry, in the folder first, then (``keep``) in memory. Replaces an older one.

        ``facts`` are ``document``, ``tenant`` and ``seconds``, see `About`. Returns the entry as
        later lookups will: quantised, if there is a codec. Raises ValueError if it exceeds
        the memory limit of a store without a folder, or if ``must_write`` is set and writing fails.
        """
        most = max(tier.ledger.max_bytes for tier in self._memories)
        if not self._blobs and kv.num_bytes > most:
            raise ValueError(
                f"a chunk of {kv.num_tokens} tokens takes {kv.num_bytes:,} bytes, the store may "
                f"hold {most:,}; allow more memory or give the store a folder"
            )
        codec, ttl = self.config.codec, self.config.ttl
        expires = None if ttl is None else time.time() + ttl
        about = About(kv.num_tokens, kv.kind, kv.fingerprint, expires=expires, **facts)
        rope = self._ropes.get(kv.fingerprint) or self._shared_ropes.get(kv.fingerprint)
        stored = kv if codec == "as-is" else round_trip(kv.to("cpu"), codec, rope)
        stored = stored.to(self.device).compact()
        for tier in self._blobs:
            tier.save(key, partial(pack_chunk, tier.blobs, key, kv, about, codec, rope), about)
        with self._lock:
            self._tracer.put(key, stored.num_bytes, about)
            if keep:
                self._remember(key, stored, about)
        return stored

    def alone(self, act: Callable[[], None]) -> None:
        """Calls ``act`` while no other process that shares the folder does, if its index works."""

        def hold(ledger: Ledger) -> bool:
            with ledger.transaction():
                act()
            return True

        if not any(tier.on_ledger(hold) for tier in self._folders):
            act()

    def flush(self) -> None:
        """Waits until all entries are written to the remote (or refused) and hits to the index."""
        for tier in self._blobs:
            tier.flush()

    def discard(self, *keys: str) -> bool:
        """Removes the entries of ``keys`` from every tier in reach. Returns whether all were."""
        # first, or a lookup could read a file and keep its entry
        done = [tier.remove(*keys) for tier in self._blobs]
        with self._lock:
            for tier in self._memories:
                for key in keys:
                    tier.remove(key)
        return all(done)

    def pin(self, key: str, pinned: bool = True) -> bool:
        """Protects an entry from eviction, or stops that. Returns whether a tier holds it."""
        return sum(self._ledgers(lambda ledger: ledger.pin([key], pinned), 0)) > 0

    def row(self, key: str) -> Row | None:
        """An entry's row in the index of the first tier that has it, or None."""
        return next(filter(None, self._ledgers(lambda ledger: ledger.row(key))), None)

    def is_pinned(self, key: str) -> bool:
        """Whether the entry is pinned in some tier."""
        return any(self._ledgers(lambda ledger: ledger.is_pinned(key), False))

    def pinned(self) -> dict[str, int]:
        """The pinned entries of all tiers: their bytes by key."""
        found = self._ledgers(lambda ledger: ledger.rows(pinned=1), ())
        return {row.key: row.size for rows in found for row in rows}

    def _ledgers(self, act: Callable[[Ledger], Any], default: Any = None) -> list:
        """Results of ``act`` on the ledger of every tier; ``default`` for one that fails."""
        with self._lock:  # not for an index, which may be busy: hits in memory must not wait
            memory = [act(tier.ledger) for tier in self._memories]
        return memory + [tier.on_ledger(act, default) for tier in self._blobs]

    def files(self, kind: type[Entry], fingerprint: str) -> Iterator[ChunkFile]:
        """Opens the folder's files of one kind and model, by its index. Skips damaged ones."""
        wanted = {"kind": kind.kind, "fingerprint": fingerprint}
        for tier in self._folders:
            for row in tier.on_ledger(lambda ledger: ledger.rows(**wanted), ()):
                with suppress(OSError, ValueError):
                    yield ChunkFile(tier.blobs, row.key, kind)

    def write_manifest(
        self, fingerprint: str, make: Callable[[], dict[str, Any]], rope: RopeSpec | None = None
    ) -> None:
        """Writes the model's manifest where it is missing. Integer codecs need the ``rope``."""
        if rope is not None:
            self._ropes[fingerprint] = rope
        for tier in self._blobs:
            tier.write_manifest(fingerprint, make)

    def share_rope(self, fingerprint: str, other: str) -> None:
        """Uses the RoPE frequencies of ``fingerprint`` for a tenant's, ``other``."""
        if (rope := self._ropes.get(fingerprint)) is not None:
            with self._lock:
                keep_latest(self._shared_ropes, other, rope, _TENANTS)

    def memoized(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """A plug-in's data for one tenant; calls ``make`` if there is none (any more)."""
        with self._lock:
            note = self._tenants_notes[key] if key in self._tenants_notes else make()
            keep_latest(self._tenants_notes, key, note, _NOTED)
            return note

    def clear(self) -> None:
        """Empties the memory and the notes. Folder and remote keep their files."""
        with self._lock:
            self.notes.clear()
            self._tenants_notes.clear()
            for tier in self._memories:
                tier.clear()

    def stats(self) -> StoreStats:
        """A copy of the counters."""
        with self._lock:
            return replace(
                self._stats,
                memory_bytes=sum(tier.ledger.size() for tier in self._memories),
                tiers={t.name: replace(t.stats) for t in (*self._memories, *self._blobs)},
            )

    def histograms(self) -> dict[str, dict[int, int]]:
        """Reuse distances and lifetimes, see `Tracer.histograms`."""
        with self._lock:
            return self._tracer.histograms()

    def __contains__(self, key: str) -> bool:
        """Whether there is an entry of ``key``. Only `get` verifies it."""
        with self._lock:
            in_memory = any(key in tier.entries for tier in self._memories)
        return in_memory or any(tier.blobs.has(key) for tier in self._blobs)

    def held(self) -> dict[str, Entry]:
        """Entries in memory, by key."""
        with self._lock:
            return {key: kv for tier in self._memories for key, kv in tier.entries.items()}

    def _hit(self, key: str, kv: Entry, tier, started: float, searched: float) -> Lookup:
        now = time.perf_counter()
        tier.stats.hits += 1
        tier.stats.bytes_read += kv.num_bytes
        tier.stats.read_s += now - started
        self._tracer.looked_up(key, kv.num_tokens, tier.name, kv.num_bytes, now - started)
        load_s = 0.0 if tier in self._memories else now - searched
        return Lookup(kv, tier.name, kv.num_bytes, now - started - load_s, load_s)

    def _accept(self, kv: Entry, key: str, token_ids, fingerprint, kind, rejected) -> bool:
        if kv.kind == kind.kind and kv.matches(token_ids, fingerprint):
            return True
        part = "model" if kv.fingerprint != fingerprint else "tokens"
        part = part if kv.kind == kind.kind else "kind of entry"
        self._reject(f"{key[:12]}: it holds other {part} than wanted", rejected)
        return False

    def _reject(self, reason: str, before: set[str]) -> None:
        """Counts a lookup that found an invalid entry, once for all tiers, and logs the reason."""
        reason = reason.replace("\n", " ")
        with self._lock:
            self._stats.rejected += not before
            first = self.warn_rejected and not self._stats.first_rejected
            self._stats.first_rejected = self._stats.first_rejected or reason
        before.add(reason)
        level, more = (logging.WARNING, "; others at level INFO") if first else (logging.INFO, "")
        _LOG.log(level, "cached chunk not used, it is encoded again: %s%s", reason, more)

    def _remember(self, key: str, kv: Entry, about: About) -> None:
        """Keeps an entry on the device, and moves the entries that it evicts to the host."""
        evicted = self._memories[0].put(key, kv, about)
        for tier in self._memories[1:]:
            if tier.ledger.is_pinned(key):
                self._memories[0].ledger.pin([key])
            tier.remove(key)
            for item in evicted:
                tier.put(*item)
