"""A store as `blocktune store` sees it: its files and what is known of them. No torch."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Self

from blocktune.cache.blobs import Blobs, secret_from_environment
from blocktune.cache.config import StoreConfig
from blocktune.cache.folder import ChunkFolder
from blocktune.cache.ledger import Ledger, Row
from blocktune.cache.listing import found_rows, open_index
from blocktune.cache.remote import open_remote


class Shelf:
    """The files of one place and their index.

    A folder has an index. That of a remote, or of a folder that has none and cannot be written, is
    made from the headers of its files when it is asked.

    Attributes:
        blobs: The files.
    """

    def __init__(self, blobs: Blobs):
        """Of a place that is there."""
        self.blobs = blobs
        is_folder = isinstance(blobs, ChunkFolder)
        # Nothing is created in a folder that is not a store.
        self._index = open_index(blobs) if is_folder and blobs.is_store() else None
        self._ledger: Ledger | None = self._index

    @classmethod
    def open(cls, place: str, make: bool = False) -> Self:
        """Opens a place as ``--store`` names it; ``make`` makes a folder that is missing.

        Raises:
            ValueError: If there is no such folder, or the URL is wrong.
        """
        config, secret = StoreConfig.parse(place), secret_from_environment()
        if config.folder is None and config.remote is None:
            raise ValueError(f"'{place}' names no folder and no URL")
        if config.folder is None:
            return cls(open_remote(config.remote, secret))
        folder = ChunkFolder(config.folder, secret)
        if make:
            folder.prepare()
        if not Path(config.folder).is_dir():
            raise ValueError(f"no store at '{place}'; `blocktune encode --store` makes one")
        return cls(folder)

    @property
    def ledger(self) -> Ledger:
        """What is known of the files."""
        if self._ledger is None:
            self._ledger = Ledger()
            self._ledger.fill(found_rows(self.blobs))
        return self._ledger

    def rows(self, model: str = "", document: str = "", start: str = "") -> Iterator[Row]:
        """Entries in order of their keys: of models and keys that start so, and of a document."""
        wanted = {"document": document} if document else {}
        rows = self.ledger.rows(start=start, **wanted)
        return (row for row in rows if row.fingerprint.startswith(model))

    def counts(self, column: str) -> dict[str, tuple[int, int, int]]:
        """Entries, tokens and bytes by the values of a column."""
        return self.ledger.counts(column)

    def names(self, fingerprint: str) -> tuple[str, str | None]:
        """Base and adapter of a model, as its manifest names them."""
        try:
            record = self.blobs.manifest(fingerprint)
            return record["base"]["name"], record["adapter"] and record["adapter"]["name"]
        except (OSError, ValueError, KeyError, TypeError):  # none, or unsound
            return "(no manifest)", None

    def clean(self) -> int:
        """Removes what stopped writers left and makes the index agree with the files.

        Returns:
            Unfinished files that were removed.
        """
        if self._index is not None:
            known, there = {row.key for row in self._index.rows()}, set(self.blobs.keys())
            self._index.remove(known - there)
            self._index.fill(found_rows(self.blobs, sorted(there - known)))
        return self.blobs.clean() if isinstance(self.blobs, ChunkFolder) else 0

    def remove(self, key: str) -> bool:
        """Removes one file; whether there was one."""
        done = self.blobs.remove(key)
        self.ledger.remove([key])
        return done

    def pin(self, keys: Iterable[str], pinned: bool) -> int:
        """Pins entries or lets them leave again; how many.

        Raises:
            ValueError: If the place has no index.
        """
        if self._index is None:
            raise ValueError(f"'{self.blobs.place}' has no index that could remember a pin")
        try:
            return self._index.pin(keys, pinned)
        except sqlite3.OperationalError as error:
            raise ValueError(f"'{self.blobs.place}': {error}") from None

    def copy(self, row: Row, target: Shelf) -> int:
        """Copies a file to another place, and what is known of it; bytes."""
        file = self.blobs.open(row.key)
        data = bytearray(file.size)
        file.read_into(memoryview(data), 0)
        target.blobs.write(row.key, bytes(data))
        target.ledger.fill([row])
        return len(data)
