"""The tiers of a store: device memory, host memory, a folder, a remote. Each has its own limits."""

from __future__ import annotations

import logging
import math
import os
import queue
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import torch

from blocktune.cache.chunk_kv import Entry
from blocktune.cache.store.blobs import Blobs
from blocktune.cache.store.chunk_file import ChunkFile, Expired
from blocktune.cache.store.config import StoreConfig, TierStats
from blocktune.cache.store.folder import TAKEN, UNREADABLE, ChunkFolder
from blocktune.cache.store.ledger import INDEX, About, Ledger, Row
from blocktune.cache.store.shelf import open_index

RETRY_S = 10.0  # seconds for which a tier is skipped after a failure
REFRESH_S = 60.0  # seconds until a remote with a limit is listed again: others write there, too
TOUCH_S = 86400.0  # least seconds between updates of a used file's time, to rebuild an index from
_WAITING, _FINISH_S = 64, 10.0  # most files that wait for a remote; seconds to end a process
_LOG = logging.getLogger(__name__)


class MemoryTier:
    """Entries in device or host memory. Host memory is pinned if there is a GPU."""

    def __init__(self, name: str, device: torch.device, config: StoreConfig):
        self.name, self.device = name, device  # the name of its limit in ``config``, too
        most = getattr(config, name)
        self.ledger = Ledger(max_bytes=most, policy=config.policy, quota=config.quota)
        self.entries: dict[str, Entry] = {}
        self._expiry: dict[str, float] = {}
        self.stats = TierStats()

    def get(self, key: str) -> Entry | None:
        """The entry of ``key``, or None."""
        if self._expiry.get(key, math.inf) > time.time():
            return self.entries.get(key)
        self.stats.expired += 1
        if not self.ledger.is_pinned(key):
            self.remove(key)
        return None

    def put(self, key: str, entry: Entry, about: About) -> list[tuple[str, Entry, About]]:
        """Keeps an entry. Returns the evicted ones, or the entry itself if it does not fit."""
        end = math.inf if about.expires is None else about.expires
        fits = entry.num_bytes <= self.ledger.max_bytes and end > time.time()
        leaving = self.ledger.leaving(entry.num_bytes, about.tenant, key) if fits else None
        if leaving is None:
            self.remove(key)
            return [(key, entry, about)]
        evicted = [(old, self.entries[old], self.ledger.row(old)) for old in leaving]
        for old in leaving:
            self.remove(old)
        self.stats.evictions += len(evicted)
        entry = entry.to(self.device)
        if self.device.type == "cpu" and torch.cuda.is_available():
            entry = entry.map(lambda tensor: tensor.pin_memory())
        self.entries[key] = entry
        self._expiry[key] = end
        self.ledger.add(key, entry.num_bytes, about)
        self.stats.bytes_written += entry.num_bytes
        return evicted

    def remove(self, key: str) -> None:
        """Removes the entry of ``key``, if any."""
        if self.entries.pop(key, None) is not None:
            del self._expiry[key]
            self.ledger.remove([key])

    def clear(self) -> None:
        """Removes all entries."""
        self.ledger.remove(self.entries)
        self.entries.clear()
        self._expiry.clear()


class BlobTier:
    """Files of entries in a folder or a remote."""

    def __init__(self, blobs: Blobs, config: StoreConfig, must_write: bool = False):
        """Creates a folder and opens its index. With ``must_write``, a failed write raises."""
        self.blobs, self.must_write, self.stats = blobs, must_write, TierStats()
        self._is_folder = folder = isinstance(blobs, ChunkFolder)
        self.name, most = ("disk", config.disk) if folder else ("remote", config.remote_bytes)
        self._budget = {"max_bytes": most, "policy": config.policy, "quota": config.quota}
        self._lock, self._pid, self._warned = threading.Lock(), os.getpid(), False
        self._retry_at, self._next_listing = {"read": 0.0, "write": 0.0, "index": 0.0}, 0.0
        self._queue = None if folder or must_write else _in_background(self)
        if folder:
            try:
                blobs.prepare()
            except OSError as error:
                self.failed(error, "write")
            self.ledger = open_index(blobs, **self._budget)
        else:
            self.ledger = Ledger(**self._budget)

    def load(
        self, key: str, kind: type[Entry], read: Callable[[ChunkFile], Any], most: int | None = None
    ) -> tuple[Any, Row, memoryview | None] | None:
        """Loads an entry by ``read``: its result, row and, of a remote, the file's content.

        None: there is none, or the tier is out of reach. ValueError: damaged. ``most``: of a file.
        """
        if time.monotonic() < self._retry_at["read"]:
            return None
        try:
            file = ChunkFile(self.blobs, key, kind, most)
            return read(file), file.row(), file.blob.data
        except Expired:
            self.stats.expired += 1
            if not self.on_ledger(lambda ledger: ledger.is_pinned(key)):  # the row keeps the pin
                self._remove(key)
        except FileNotFoundError:
            pass
        except OSError as error:
            self.failed(error, "read")
        return None

    def used(self, row: Row) -> None:
        """Counts a hit."""
        if time.time() - row.used > TOUCH_S:
            self.blobs.touch(row.key)
        new = row if self._is_folder else None  # rows of a remote come from listing it
        self.on_ledger(lambda ledger: ledger.use(row.key, new))

    def save(self, key: str, make: Callable[[], bytes], about: About) -> None:
        """Writes the file that ``make`` packs, if it fits; a remote's later, unless it must."""
        if (pending := self._pending()) is None:
            self._save(key, make, about)
            return
        try:
            pending.put_nowait(partial(self._save, key, make, about))
        except queue.Full:  # a slow remote must not delay answers
            with self._lock:
                self.stats.unwritten += 1

    def flush(self) -> None:
        """Waits until all files and hits are written, or refused."""
        if (pending := self._pending()) is not None:
            pending.join()
        self.on_ledger(lambda ledger: ledger.flush())

    def _save(self, key: str, make: Callable[[], bytes], about: About) -> None:
        started, data, written = time.perf_counter(), b"", False
        try:
            may_write = self.must_write or time.monotonic() >= self._retry_at["write"]
            if may_write and self._make_room(len(data := make()), key, about):
                self.blobs.write(key, data)
                written = True
                if self.on_ledger(lambda ledger: ledger.row(key), about) is None:
                    self.blobs.remove(key)  # evicted before its file was there
        except OSError as error:
            if not self._is_folder or not self.blobs.has(key):  # else its older file is still there
                self.on_ledger(lambda ledger: ledger.remove([key]))
            self.failed(error, "write")
        finally:
            with self._lock:
                self.stats.unwritten += not written
                self.stats.bytes_written += written * len(data)
                self.stats.write_s += written * (time.perf_counter() - started)

    def remove(self, *keys: str) -> bool:
        """Removes the files of ``keys``, also those not written yet. Returns whether it could."""
        done = self._remove(*keys)
        if (pending := self._pending()) is not None and pending.unfinished_tasks:
            pending.put(partial(self._remove, *keys))
        return done

    def _remove(self, *keys: str) -> bool:
        try:
            for key in keys:
                self.blobs.remove(key)
            self.on_ledger(lambda ledger: ledger.remove(keys))
            return True
        except OSError as error:
            self.failed(error, "write")
            return False

    def write_manifest(self, fingerprint: str, make: Callable[[], dict[str, Any]]) -> None:
        """Writes a model's manifest, from ``make``, unless there is one."""
        with suppress(OSError, ValueError):  # damaged or not signed: write it again
            if time.monotonic() < self._retry_at["write"] or self.blobs.manifest(fingerprint):
                return
        try:
            self.blobs.write_manifest(make())
        except OSError as error:
            self.failed(error, "write")

    def failed(self, error: OSError, what: str) -> None:
        """Warns once and skips the tier for a while. ValueError: it must write and cannot."""
        writes = what == "write"
        verb = "write to" if writes else "read"
        reason = f"cannot {verb} the store '{self.blobs.place}': {error.strerror or error}"
        if self.must_write and writes:
            hint = "free space there" if self._is_folder else "check address and credentials"
            raise ValueError(f"{reason}; {hint} or choose another store") from None
        alone = error.errno in TAKEN + UNREADABLE * (self._is_folder and not writes)
        with self._lock:
            self.stats.failures += 1
            if not alone:
                self._retry_at[what] = time.monotonic() + RETRY_S
            warned, self._warned = self._warned, True
        if not warned:
            lost = "a chunk is" if alone else "chunks are"
            then = f"{lost} {'not stored there' if writes else 'encoded instead'}"
            _LOG.warning("%s; %s", reason.replace("\n", " "), then)

    def _make_room(self, size: int, key: str, about: About) -> bool:
        most = self._budget["max_bytes"]
        if not self._is_folder and most is not None and time.monotonic() >= self._next_listing:
            self._next_listing = time.monotonic() + REFRESH_S
            rows = list(self.blobs.listing())
            gone = {row.key for row in self.ledger.rows()} - {k for k, _, _ in rows}
            self.ledger.remove(gone)
            self.ledger.fill(Row(key=k, size=n, created=t, used=t, uses=1) for k, n, t in rows)

        def admit(ledger: Ledger) -> list[str] | None:
            # The new entry lacks its file if the process is killed.
            with ledger.transaction():
                leaving = ledger.leaving(size, about.tenant, key)
                if leaving is not None:
                    for old in leaving:
                        self.blobs.remove(old)
                    ledger.remove(leaving)
                    ledger.add(key, size, about)
                return leaving

        leaving = self.on_ledger(admit, [] if most is None else False)
        if leaving is False:
            self.ledger = self.ledger or open_index(self.blobs, **self._budget)  # for the next one
            raise OSError(f"{INDEX}, which keeps account of its size, cannot be written")
        with self._lock:
            self.stats.evictions += len(leaving or ())
        return leaving is not None

    def on_ledger(self, act: Callable[[Ledger], object], default: object = None):
        """Calls ``act`` on the ledger. If that fails, skips it for a while, or rebuilds it."""
        if self.ledger is None or time.monotonic() < self._retry_at["index"]:
            return default
        try:
            return act(self.ledger)
        except sqlite3.Error as error:
            _LOG.info("index of '%s' not used: %s", self.blobs.place, error)
            self._retry_at["index"] = time.monotonic() + RETRY_S
            if not isinstance(error, sqlite3.OperationalError):  # damaged
                self.ledger = open_index(self.blobs, **self._budget)
            return default

    def _pending(self) -> queue.Queue | None:
        """The calls that wait for a remote. A fork has no threads: it gets a queue of its own."""
        if self._queue is not None and self._pid != os.getpid():
            self._queue, self._pid = _in_background(self), os.getpid()
        return self._queue


def _in_background(tier: BlobTier) -> queue.Queue:
    """A queue of calls, with a thread that makes them until the tier or the process ends."""
    pending: queue.Queue = queue.Queue(_WAITING)

    def work() -> None:
        while (act := pending.get()) is not None:
            try:
                act()
            except Exception:  # such as too little memory: others still wait
                _LOG.exception("a chunk was not written")
            pending.task_done()
            del act  # queued calls keep the tier alive, this thread must not

    def finish() -> None:
        with suppress(queue.Full):
            pending.put(None, timeout=_FINISH_S)
            if threading.current_thread() is not thread:
                thread.join(_FINISH_S)
        if (left := pending.unfinished_tasks) > 1:  # one is the end itself
            _LOG.warning("up to %d chunks were not written to a remote store; call flush()", left)

    thread = threading.Thread(target=work, daemon=True, name="blocktune-remote")
    thread.start()
    weakref.finalize(tier, finish)
    return pending
