"""A store as another engine's processes see it: which chunks there are, of which models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from blocktune.cache.blobs import Blobs, secret_from_environment
from blocktune.cache.config import StoreConfig
from blocktune.cache.folder import ChunkFolder
from blocktune.cache.miss_queue import MissQueue, Wanted
from blocktune.cache.remote import open_remote


class StoreView:
    """The files of a store's folder and remote; nothing is written but what is asked for.

    Attributes:
        config: Of the store, without memory.
        place: Folder or URL, for messages.
    """

    def __init__(self, store: str | Path):
        """Of a store as ``--store`` names it.

        Raises:
            ValueError: If the text is wrong, or names no place.
        """
        self.config = StoreConfig.parse(store, memory=0)
        self.place = self.config.place
        secret = secret_from_environment()
        self._blobs: list[Blobs] = []
        if self.config.folder is not None:
            self._blobs.append(ChunkFolder(self.config.folder, secret))
        if self.config.remote is not None:
            self._blobs.append(open_remote(self.config.remote, secret))

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

    def ask_for(self, fingerprint: str, chunks: list[Wanted]) -> None:
        """Queues chunks for `blocktune encode --follow`, if the store has a folder for that."""
        if self.config.folder is not None:
            MissQueue(self.config.folder).add(fingerprint, chunks)

    def encoded(self, fingerprint: str, chunks: list[Wanted]) -> None:
        """Takes chunks out of the queue."""
        if self.config.folder is not None:
            MissQueue(self.config.folder).done(fingerprint, chunks)
