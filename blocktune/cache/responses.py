"""Whole answers, kept on a chunk store: for the same prompt, or for a similar question."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from blocktune.cache.fingerprint import chunk_key
from blocktune.cache.records import MODEL, Embedder, Nearest, Record, keep, text_bytes
from blocktune.cache.store import ChunkStore


@dataclass(frozen=True)
class ResponseCache:
    """Answers of earlier requests, on the tiers and under the budgets of a store.

    An answer is found only in its place: a hex digest of all that decides it but the question.
    """

    store: ChunkStore
    threshold: float | None = None  # least similarity of another question; None: the same one only
    model: str = MODEL  # embeds the questions

    @classmethod
    def parse(cls, text: str, store: ChunkStore) -> ResponseCache:
        """Reads ``exact``, ``semantic:THRESHOLD`` or ``semantic:THRESHOLD:MODEL``.

        Raises ValueError if the text is none of them, or there is no such model.
        """
        if text == "exact":
            return cls(store)
        kind, _, rest = text.partition(":")
        share, _, model = rest.partition(":")
        known = kind == "semantic" and share.replace(".", "", 1).isdigit()
        if not known or not 0 < float(share) <= 1:
            raise ValueError(
                "a response cache is 'exact' or 'semantic:THRESHOLD[:MODEL]' with a threshold in "
                f"(0, 1], got '{text}'"
            )
        made = cls(store, float(share), model or MODEL)
        made.load()
        return made

    def load(self) -> None:
        """Loads the embedding model, if questions are compared; ValueError if there is none."""
        if self.threshold is not None:
            Embedder.of(self.store, self.model)

    def find(self, place: str, query: Sequence[int], question: str) -> tuple[Any, float] | None:
        """What was kept for a question's tokens, and 1.0; or for a similar text, and how similar.

        Without a text (``question`` is empty) only the same tokens are found.
        """
        found, similarity = self._get(place, chunk_key(place, query), query), 1.0
        if found is None and self.threshold is not None and question:
            for key, _, similarity in self._list(place).find(self._vector(question)):
                if similarity >= self.threshold:
                    found = self._get(place, key, ())
        return None if found is None else (found, min(similarity, 1.0))

    def keep(
        self, place: str, query: Sequence[int], question: str, facts: Any, **about: Any
    ) -> None:
        """Keeps plain JSON; ``about`` it as `ChunkStore.put` takes it."""
        data = (text_bytes(json.dumps(facts)).to(torch.uint8),)
        ids = torch.tensor(query, dtype=torch.int64)
        keep(self.store, chunk_key(place, query), Record(data, ids, place), **about)
        if self.threshold is not None and question:
            # Found without knowing its question, so its place alone verifies it.
            key, record = chunk_key(place, query, {"similar": True}), Record(data, ids[:0], place)
            if keep(self.store, key, record, **about):
                self._list(place).add(key, len(query), self._vector(question))

    def _get(self, place: str, key: str, ids: Sequence[int]) -> Any:
        record = self.store.get(key, ids, place, Record)
        return None if record is None else json.loads(bytes(record.data[0].tolist()))

    def _list(self, place: str) -> Nearest:
        return Nearest(self.store, chunk_key(place, (), {"questions": self.model}), most=256)

    def _vector(self, question: str) -> torch.Tensor:
        return Embedder.of(self.store, self.model)([question])[0]
