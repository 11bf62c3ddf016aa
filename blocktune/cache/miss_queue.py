"""Chunks that a reader wanted and did not find, for `blocktune encode --follow`.

One file a chunk in the store's folder ``wanted``, named by the chunk's key: the same chunk is
wanted once, however many readers miss it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from blocktune.cache.fingerprint import stored_key
from blocktune.files import replace_json

WANTED = "wanted"


class Wanted(NamedTuple):
    """A chunk to encode: its tokens, what they are encoded after, whether it is a scoped prefix."""

    ids: tuple[int, ...]
    blanks: tuple[int, ...] = ()
    prefix: bool = False


class MissQueue:
    """The queue in a store's folder; any number of processes may write and work it off."""

    def __init__(self, store: str | Path):
        """Of the store at ``store``; the folder is made by the first `add`."""
        self.folder = Path(store) / WANTED

    def add(self, fingerprint: str, chunks: Iterable[Wanted]) -> None:
        """Asks for chunks of the model ``fingerprint``."""
        for one in chunks:
            path = self._path(fingerprint, one)
            if not path.exists():
                replace_json(path, {"fingerprint": fingerprint, **one._asdict()})

    def take(self, fingerprint: str, most: int = 256) -> list[Wanted]:
        """Wanted chunks of a model, at most ``most``; they stay until `done`."""
        found: list[Wanted] = []
        for path in self._files():
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
        for one in chunks:
            self._path(fingerprint, one).unlink(missing_ok=True)

    def _path(self, fingerprint: str, one: Wanted) -> Path:
        return self.folder / f"{stored_key(fingerprint, *one)}.json"

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("*.json")) if self.folder.is_dir() else []
