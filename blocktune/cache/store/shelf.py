"""A store without its tensors: its index, files and queue of misses. No torch is imported."""

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

from blocktune.cache.store.blobs import Blobs, secret_from_environment
from blocktune.cache.store.config import Row, StoreConfig
from blocktune.cache.store.folder import WRITING, ChunkFolder
from blocktune.cache.store.ledger import INDEX, Ledger
from blocktune.cache.store.remote import open_remote
from blocktune.files import replace_json

PATIENCE_S = 600.0  # limit on one request of a tool, which must have all of a chunk
NO_MANIFEST = "(no manifest)"
WANTED = "wanted"  # folder inside a store that lists the chunks that readers missed
_LOG = logging.getLogger(__name__)


def open_places(config: StoreConfig, secret: bytes | None = None) -> list[Blobs]:
    """Opens a store's folder and its remote, if any. The secret's default is the environment's."""
    secret = secret_from_environment() if secret is None else secret
    places = [] if config.folder is None else [ChunkFolder(config.folder, secret)]
    if config.remote is not None:
        places.append(open_remote(config.remote, secret, config.wait))
    return places


def open_index(folder: ChunkFolder, **budget) -> Ledger | None:
    """Opens a folder's index, rebuilt if lost or damaged; None if that is impossible."""
    path = folder.path / INDEX
    with suppress(OSError):  # files that cannot be listed, an index that cannot be removed
        for _ in range(3):
            if path.is_symlink() or (path.exists() and not path.is_file()):
                _LOG.warning("'%s' is not the index of the store; it is not used", path)
                return None
            try:
                if not path.exists():
                    path.touch()  # SQLite would not let a group write, whatever the umask
                ledger = Ledger(path, **budget)
                if not ledger.size():  # new, lost or emptied
                    ledger.fill(found_rows(folder))
                return ledger
            except sqlite3.OperationalError as error:  # read-only, or locked for too long
                if "locked" not in str(error):
                    return None
                time.sleep(0.1)
            except sqlite3.DatabaseError:
                for suffix in ("", "-wal", "-shm"):
                    path.with_name(INDEX + suffix).unlink(missing_ok=True)
    return None


def found_rows(blobs: Blobs, keys: Iterable[str] | None = None) -> Iterator[Row]:
    """Index rows of all files, or of ``keys``, from their headers; blank for damaged files."""
    for key in blobs.keys() if keys is None else keys:
        try:
            yield blobs.facts(key)[1]
        except FileNotFoundError:
            continue
        except (OSError, ValueError):
            yield Row.of({}, 0, key, 1, time.time())


class Shelf:
    """The files of a folder or remote, and their index: a file, or built from their headers."""

    def __init__(self, blobs: Blobs):
        self.blobs = blobs
        # The index file, if any. Create nothing in a folder that is not a store.
        self.index = open_index(blobs) if self._is_store(blobs) else None

    @staticmethod
    def _is_store(blobs: Blobs) -> bool:
        return isinstance(blobs, ChunkFolder) and (blobs.path / WRITING).is_dir()

    @classmethod
    def open(cls, place: str, make: bool = False) -> Self:
        """Opens a place as named by ``--store``; ``make`` creates a missing folder."""
        config = StoreConfig.parse(place)
        remote = None if config.folder else config.remote
        if make and config != StoreConfig(folder=config.folder, remote=remote, wait=config.wait):
            raise ValueError(f"'{place}': chunks are copied unchanged; name the place alone")
        if (config.folder is None) == (config.remote is None):
            raise ValueError(f"'{place}' names no place, or two places; give one folder or URL")
        blobs = open_places(config)[0]
        blobs.timeout_s = PATIENCE_S
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
        """The index of the files."""
        if self.index is not None:
            return self.index
        ledger = Ledger()
        if self._is_store(self.blobs) and not (path := self.blobs.path / INDEX).is_symlink():
            ledger.copy(path)
        ledger.fill(found_rows(self.blobs))
        return ledger

    def rows(self, model: str = "", document: str = "", start: str = "") -> Iterator[Row]:
        """Entries sorted by key. ``model`` and ``start`` match prefixes of fingerprint and key."""
        if self.index is None and start:  # reads the headers of these alone
            return found_rows(self.blobs, (k for k in self.blobs.keys() if k.startswith(start)))  # noqa: SIM118
        rows = self.ledger.rows(start=start, **({"document": document} if document else {}))
        return (row for row in rows if row.fingerprint.startswith(model))

    def names(self, fingerprint: str) -> tuple[str, str | None]:
        """Names of a model's base and adapter (or None), from its manifest."""
        try:
            record = self.blobs.manifest(fingerprint)
            return record["base"]["name"], record["adapter"] and record["adapter"]["name"]
        except (OSError, ValueError, KeyError, TypeError):  # missing or damaged
            return NO_MANIFEST, None

    def mend(self) -> dict[str, int]:
        """Repairs the index and removes unfinished files. Returns how much it repaired."""
        if self.index is None:
            return {"without_file": 0, "not_indexed": 0}
        self.blobs.clean()
        indexed, stored = {row.key for row in self.index.rows()}, set(self.blobs.keys())
        # Other processes add an entry to the index before they write its file: check again.
        writing = {path.name[1:65] for path in (self.blobs.path / WRITING).glob(".*.part")}
        gone = {key for key in indexed - stored - writing if not self.blobs.has(key)}
        self.index.remove(gone)
        self.index.fill(found_rows(self.blobs, sorted(stored - indexed)))
        return {"without_file": len(gone), "not_indexed": len(stored - indexed)}


class Wanted(NamedTuple):
    """A chunk to encode: its tokens, the blanks before it, whether it is a scoped prefix."""

    ids: tuple[int, ...]
    blanks: tuple[int, ...] = ()
    prefix: bool = False


class MissQueue:
    """Chunks that readers missed, for `blocktune encode --follow`: one ``MODEL/KEY.json`` each."""

    def __init__(self, store: str | Path | None):
        """Uses the folder ``store``; the first `add` creates it. With None, the queue is empty."""
        self.folder = None if store is None else Path(store).absolute() / WANTED

    def add(self, fingerprint: str, chunks: Iterable[Wanted]) -> None:
        """Adds chunks of the model ``fingerprint``, or warns that the folder cannot be written."""
        try:
            for path, chunk in self._paths(fingerprint, chunks):
                if not path.exists():
                    replace_json(path, {"fingerprint": fingerprint, **chunk._asdict()})
        except OSError as error:  # a reader may have a read-only mount
            _LOG.warning("cannot queue chunks in '%s': %s", self.folder, error.strerror)

    def take(self, fingerprint: str, most: int = 256) -> list[Wanted]:
        """Returns at most ``most`` wanted chunks of a model. They stay queued until `done`."""
        chunks: list[Wanted] = []
        if self.folder is None:
            return chunks
        # Made here, since only its owner may remove what other users add (vLLM as root).
        (self.folder / fingerprint).mkdir(parents=True, exist_ok=True)
        for path in sorted((self.folder / fingerprint).glob("*.json")):
            with suppress(OSError, ValueError, KeyError, TypeError):  # just removed, or foreign
                record = json.loads(path.read_text())
                ids, blanks = tuple(record["ids"]), tuple(record["blanks"])
                chunk = Wanted(ids, blanks, bool(record["prefix"]))
                if (path, chunk) in self._paths(fingerprint, [chunk]):  # else it is a copy
                    chunks.append(chunk)
            if len(chunks) == most:
                break
        return chunks

    def done(self, fingerprint: str, chunks: Iterable[Wanted]) -> None:
        """Removes chunks from the queue, because they are stored or cannot be encoded."""
        for path, _ in self._paths(fingerprint, chunks):
            path.unlink(missing_ok=True)

    def _paths(self, fingerprint: str, chunks: Iterable[Wanted]) -> Iterator[tuple[Path, Wanted]]:
        from blocktune.cache.store.fingerprint import stored_key  # imports torch

        for chunk in chunks if self.folder is not None else ():
            yield self.folder / fingerprint / f"{stored_key(fingerprint, *chunk)}.json", chunk


class StoreView:
    """Read-only view of a store's files, without an index; ``queue`` takes chunks to encode."""

    def __init__(self, store: str | Path):
        """Opens a store as named by ``--store``; ValueError if it names no place, or a press."""
        self.config = StoreConfig.parse(store, memory=0)
        if self.config.place is None or self.config.press is not None:
            raise ValueError(f"vLLM reads whole chunks from a folder or a URL, got '{store}'")
        self.place, self.queue = self.config.place, MissQueue(self.config.folder)
        self._blobs = open_places(self.config)

    def has(self, key: str) -> bool:
        """Whether the folder or the remote has a chunk. It is not verified."""
        return any(blobs.has(key) for blobs in self._blobs)

    def manifest(self, fingerprint: str) -> dict[str, Any] | None:
        """The first manifest found in the folder or the remote, see `Blobs.manifest`."""
        records = (blobs.manifest(fingerprint) for blobs in self._blobs)
        return next(filter(None, records), None)

    def manifests(self) -> list[dict[str, Any]]:
        """The manifests of all models. Raises ValueError if the store is out of reach."""
        try:
            names = {name for blobs in self._blobs for name in blobs.fingerprints()}
            return list(filter(None, map(self.manifest, sorted(names))))
        except OSError as error:
            raise ValueError(f"cannot read the store '{self.place}': {error}") from None
