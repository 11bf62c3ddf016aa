"""Response cache on a chunk store: whole answers, for the same prompt or a similar question."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from blocktune.cache.store.chunk_store import ChunkStore
from blocktune.cache.store.fingerprint import chunk_key
from blocktune.cache.store.records import MODEL, Embedder, Nearest, Record, keep, text_bytes


def read_settings(text: str) -> tuple[float | None, str]:
    """The threshold (None: exact match only) and model of a text; ValueError if it is wrong."""
    kind, _, rest = text.partition(":")
    share, _, model = rest.partition(":")
    if text == "exact":
        return None, MODEL
    number = share.replace(".", "", 1).isdigit()
    if kind == "semantic" and number and 0 < float(share) <= 1:
        return float(share), model or MODEL
    form = "'exact' or 'semantic:THRESHOLD[:MODEL]' with a threshold in (0, 1]"
    raise ValueError(f"a response cache is {form}, got '{text}'")


@dataclass(frozen=True)
class ResponseCache:
    """Answers of earlier requests, by ``place``: a hex digest of all inputs but the question."""

    store: ChunkStore
    threshold: float | None = None  # least similarity of another question; None: exact match only
    model: str = MODEL  # embeds the questions

    @classmethod
    def parse(cls, text: str, store: ChunkStore) -> ResponseCache:
        """The cache by `read_settings`. ValueError: they are wrong, or the model does not load."""
        return cls(store, *read_settings(text))

    def __post_init__(self):
        if self.threshold is not None:
            Embedder.of(self.store, self.model)  # loads it

    def find(self, place: str, query: Sequence[int], question: str) -> tuple[Any, float] | None:
        """The cached value of the same tokens or a similar question, and similarity; or None."""
        value, similarity = self._get(place, chunk_key(place, query), query), 1.0
        if value is None and self.threshold is not None and question:
            for key, _, similarity in self._list(place).find(self._embedder([question])[0]):
                value = self._get(place, key, ()) if similarity >= self.threshold else None
        return None if value is None else (value, min(similarity, 1.0))

    def keep(
        self, place: str, query: Sequence[int], question: str, facts: Any, **about: Any
    ) -> None:
        """Stores the JSON value ``facts``. ``about`` is passed on to `ChunkStore.put`."""
        data = (text_bytes(json.dumps(facts)).to(torch.uint8),)
        ids = torch.tensor(query, dtype=torch.int64)
        keep(self.store, chunk_key(place, query), Record(data, ids, place), **about)
        if self.threshold is not None and question:
            # It is found without knowing its question, so only its place verifies it.
            key, record = chunk_key(place, query, {"similar": True}), Record(data, ids[:0], place)
            if keep(self.store, key, record, **about):
                self._list(place).add(key, len(query), self._embedder([question])[0])

    def _get(self, place: str, key: str, ids: Sequence[int]) -> Any:
        record = self.store.get(key, ids, place, Record)
        return None if record is None else json.loads(bytes(record.data[0].tolist()))

    def _list(self, place: str) -> Nearest:
        # Of these weights, not of their name: vectors of different models cannot be compared.
        scope = chunk_key(place, (), {"questions": self._embedder.fingerprint})
        return Nearest(self.store, scope, most=256)

    @property
    def _embedder(self) -> Embedder:
        return Embedder.of(self.store, self.model)
