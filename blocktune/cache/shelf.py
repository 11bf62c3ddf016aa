"""A store without its tensors: its index, its files, and what readers missed. No torch.

`Shelf` is what `blocktune store` looks into, `StoreView` what another engine's processes see.
"""

from __future__ import annotations

import json
import logging
import sqlite3
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Self

from blocktune.cache.blobs import Blobs, secret_from_environment
from blocktune.cache.config import Row, StoreConfig
from blocktune.cache.folder import WRITING, ChunkFolder
from blocktune.cache.ledger import INDEX, Ledger
from blocktune.cache.remote import open_remote
from blocktune.files import replace_json

WANTED = "wanted"
"""Folder of a store with the chunks that readers did not find."""
_LOG = logging.getLogger(__name__)


def open_places(config: StoreConfig, secret: bytes | None = None) -> list[Blobs]:
    """The folder and the remote of a store that has them; the environment may have the secret."""
    secret = secret_from_environment() if secret is None else secret
    found = [] if config.folder is None else [ChunkFolder(config.folder, secret)]
    return found if config.remote is None else [*found, open_remote(config.remote, secret)]


def open_index(folder: ChunkFolder, **budget) -> Ledger | None:
    """The index of a folder, made from its files if it is lost or damaged; None if it cannot be.

    The ``budget`` is that of `Ledger`; without a ``policy`` the index keeps its own.
    """
    path = folder.path / INDEX
    for _ in range(3):
        fresh = not path.exists()
        if path.is_symlink() or not (fresh or path.is_file()):
            _LOG.warning("'%s' is not the index of the store; it is not used", path)
            return None
        try:
            ledger = Ledger(path, **budget)
            if fresh:
                ledger.fill(found_rows(folder))
            return ledger
        except sqlite3.OperationalError as error:  # read-only, or held too long
            if "locked" not in str(error):
                return None
            time.sleep(0.1)
        except sqlite3.DatabaseError:
            for suffix in ("", "-wal", "-shm"):
                path.with_name(INDEX + suffix).unlink(missing_ok=True)
    return None


def found_rows(blobs: Blobs, keys: Iterable[str] | None = None) -> Iterator[Row]:
    """Rows of all files or of some, from their headers; one that cannot be read has no model."""
    for key in blobs.keys() if keys is None else keys:
        try:
            yield blobs.facts(key)[1]
        except FileNotFoundError:
            continue
        except (OSError, ValueError):
            yield Row.of({}, 0, key, 1, time.time())


class Shelf:
    """The files of one place and their index.

    A folder has an index. That of a remote, or of a folder that has none and cannot be written, is
    made from the headers of its files when it is asked.
    """

    def __init__(self, blobs: Blobs):
        """Of a place that is there."""
        self.blobs = blobs
        # Nothing is created in a folder that is not a store.
        self._index = open_index(blobs) if self._is_store(blobs) else None

    @staticmethod
    def _is_store(blobs: Blobs) -> bool:
        return isinstance(blobs, ChunkFolder) and (blobs.path / WRITING).is_dir()

    @classmethod
    def open(cls, place: str, make: bool = False) -> Self:
        """Opens a place as ``--store`` names it; ``make`` makes a folder that is missing."""
        config = StoreConfig.parse(place)
        if config.place is None:
            raise ValueError(f"'{place}' names no folder and no URL")
        plain = StoreConfig(folder=config.folder, remote=None if config.folder else config.remote)
        if make and config != plain:
            raise ValueError(f"'{place}': chunks are copied as they are; name the place alone")
        blobs = open_places(config)[0]
        if config.folder is None:
            try:
                blobs.fingerprints()
            except OSError as error:
                raise ValueError(f"cannot read the store '{blobs.place}': {error}") from None
        elif make:
            blobs.prepare()
        elif not any((cls._is_store(blobs), next(blobs.keys(), None), blobs.fingerprints())):
            raise ValueError(f"no store at '{place}'; `blocktune encode --store` makes one")
        return cls(blobs)

    @cached_property
    def ledger(self) -> Ledger:
        """What is known of the files."""
        if self._index is not None:
            return self._index
        ledger = Ledger()
        ledger.fill(found_rows(self.blobs))
        return ledger

    def rows(self, model: str = "", document: str = "", start: str = "") -> Iterator[Row]:
        """Entries in order of their keys: of models and keys that start so, and of a document."""
        wanted = {"document": document} if document else {}
        rows = self.ledger.rows(start=start, **wanted)
        return (row for row in rows if row.fingerprint.startswith(model))

    def names(self, fingerprint: str) -> tuple[str, str | None]:
        """Base and adapter of a model, as its manifest names them."""
        try:
            record = self.blobs.manifest(fingerprint)
            return record["base"]["name"], record["adapter"] and record["adapter"]["name"]
        except (OSError, ValueError, KeyError, TypeError):  # none, or unsound
            return "(no manifest)", None

    def mend(self) -> dict[str, int]:
        """Makes the index agree with the files; how many entries it had too many, and too few.

        A full disk or a kill may leave either. ValueError: the index cannot be written.
        """
        if self._index is None:
            return {"without_file": 0, "not_indexed": 0}
        try:
            known, there = {row.key for row in self._index.rows()}, set(self.blobs.keys())
            # Another process enters a file in the index before it writes it.
            gone = {key for key in known - there if not self.blobs.has(key)}
            self._index.remove(gone)
            self._index.fill(found_rows(self.blobs, sorted(there - known)))
        except sqlite3.Error as error:
            raise ValueError(f"the index of '{self.blobs.place}': {error}") from None
        return {"without_file": len(gone), "not_indexed": len(there - known)}

    def pin(self, keys: Iterable[str], pinned: bool) -> int:
        """Pins entries or lets them leave again; how many."""
        if self._index is None:
            raise ValueError(f"'{self.blobs.place}' has no index that could remember a pin")
        try:
            return self._index.pin(keys, pinned)
        except sqlite3.OperationalError as error:
            raise ValueError(f"'{self.blobs.place}': {error}") from None


class Wanted(NamedTuple):
    """A chunk to encode: its tokens, what they are encoded after, whether it is a scoped prefix."""

    ids: tuple[int, ...]
    blanks: tuple[int, ...] = ()
    prefix: bool = False


class MissQueue:
    """Chunks that readers missed, for `blocktune encode --follow`; any process may add or take.

    One file a chunk in the store's folder, named by the chunk's key: the same chunk is wanted once.
    """

    def __init__(self, store: str | Path | None):
        """Of the store at ``store``, whose folder the first `add` makes; None keeps nothing."""
        self.folder = None if store is None else Path(store) / WANTED

    def add(self, fingerprint: str, chunks: Iterable[Wanted]) -> None:
        """Asks for chunks of the model ``fingerprint``."""
        for path, one in self._paths(fingerprint, chunks):
            if not path.exists():
                replace_json(path, {"fingerprint": fingerprint, **one._asdict()})

    def take(self, fingerprint: str, most: int = 256) -> list[Wanted]:
        """Wanted chunks of a model, at most ``most``; they stay until `done`."""
        found: list[Wanted] = []
        for path in sorted(self.folder.glob("*.json")):
            with suppress(OSError, ValueError, KeyError, TypeError):  # gone, or not ours
                record = json.loads(path.read_text())
                if record["fingerprint"] == fingerprint:
                    ids, blanks = tuple(record["ids"]), tuple(record["blanks"])
                    found.append(Wanted(ids, blanks, bool(record["prefix"])))
            if len(found) == most:
                break
        return found

    def done(self, fingerprint: str, chunks: Iterable[Wanted]) -> None:
        """Removes chunks from the queue, because they are stored or cannot be encoded."""
        for path, _ in self._paths(fingerprint, chunks):
            path.unlink(missing_ok=True)

    def _paths(self, fingerprint: str, chunks: Iterable[Wanted]) -> Iterator[tuple[Path, Wanted]]:
        from blocktune.cache.fingerprint import stored_key  # which takes torch

        for one in chunks if self.folder is not None else ():
            yield self.folder / f"{stored_key(fingerprint, *one)}.json", one


class StoreView:
    """The files of a store's folder and remote, without an index; nothing is written."""

    def __init__(self, store: str | Path):
        """Of a store as ``--store`` names it; its ``queue`` is of chunks to encode."""
        self.config = StoreConfig.parse(store, memory=0)
        self.place, self.queue = self.config.place, MissQueue(self.config.folder)
        self._blobs = open_places(self.config)

    def has(self, key: str) -> bool:
        """Whether a chunk is somewhere; not verified."""
        return any(blobs.has(key) for blobs in self._blobs)

    def manifest(self, fingerprint: str) -> dict[str, Any] | None:
        """As `Blobs.manifest`, of the first place that has one."""
        found = (blobs.manifest(fingerprint) for blobs in self._blobs)
        return next((record for record in found if record is not None), None)

    def manifests(self) -> list[dict[str, Any]]:
        """Of all models."""
        names = {name for blobs in self._blobs for name in blobs.fingerprints()}
        found = (self.manifest(name) for name in sorted(names))
        return [record for record in found if record is not None]
