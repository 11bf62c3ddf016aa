"""Chunks that a reader wanted and did not find, for `blocktune encode --follow`.

One file a chunk in the store's folder ``wanted``, named by the chunk's key: the same chunk is
wanted once, however many readers miss it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from blocktune.cache.fingerprint import key_after
from blocktune.files import replace_json

WANTED = "wanted"


class Wanted(NamedTuple):
    """A chunk to encode: its tokens, and what they are encoded after."""

    ids: tuple[int, ...]
    blanks: tuple[int, ...]


class MissQueue:
    """The queue in a store's folder; any number of processes may write and work it off."""

    def __init__(self, store: str | Path):
        """Of the store at ``store``; the folder is made by the first `add`."""
        self.folder = Path(store) / WANTED

    def add(self, fingerprint: str, chunks: Iterable[tuple[Sequence[int], Sequence[int]]]) -> None:
        """Asks for chunks, each by its ids and blanks, of the model ``fingerprint``."""
        for ids, blanks in chunks:
            path = self.folder / f"{key_after(fingerprint, ids, blanks)}.json"
            if not path.exists():
                replace_json(
                    path, {"fingerprint": fingerprint, "ids": list(ids), "blanks": list(blanks)}
                )

    def take(self, fingerprint: str, most: int = 256) -> list[Wanted]:
        """Wanted chunks of a model, at most ``most``; they stay until `done`."""
        found: list[Wanted] = []
        for path in self._files():
            with suppress(OSError, ValueError, KeyError, TypeError):  # gone, or not ours
                record = json.loads(path.read_text())
                if record["fingerprint"] == fingerprint:
                    found.append(Wanted(tuple(record["ids"]), tuple(record["blanks"])))
            if len(found) == most:
                break
        return found

    def done(self, fingerprint: str, chunks: Iterable[Wanted]) -> None:
        """Removes chunks from the queue, because they are stored or cannot be encoded."""
        for ids, blanks in chunks:
            (self.folder / f"{key_after(fingerprint, ids, blanks)}.json").unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("*.json")) if self.folder.is_dir() else []
