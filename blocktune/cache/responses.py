"""Whole answers, kept on a chunk store: for the same prompt, or for a similar question.

An answer is found only under everything else that decides it: model and tenant (by the fingerprint
of a salted engine), method, decoding settings, and the tokens of the context.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from blocktune.cache.embeddings import MODEL, Embedder
from blocktune.cache.fingerprint import chunk_key
from blocktune.cache.records import Nearest, Record, keep, text_bytes
from blocktune.cache.store import ChunkStore

Ids = tuple[int, ...]


class Response(NamedTuple):
    """A kept answer.

    Attributes:
        facts: What was kept with it, plain JSON.
        similarity: 1.0 for the same question, else the cosine similarity of the question that it
            answered.
        num_bytes: Bytes read.
    """

    facts: Mapping[str, Any]
    similarity: float
    num_bytes: int


@dataclass(frozen=True)
class ResponseCache:
    """Answers of earlier requests, on the tiers and under the budgets of a store.

    Attributes:
        store: Where they are kept, as records.
        threshold: Least cosine similarity of a question whose answer is given to another one over
            the same context; None: only the same prompt is answered so.
        model: Embeds the questions.
    """

    store: ChunkStore
    threshold: float | None = None
    model: str = MODEL

    @classmethod
    def parse(cls, text: str, store: ChunkStore) -> ResponseCache:
        """Reads ``exact``, ``semantic:THRESHOLD`` or ``semantic:THRESHOLD:MODEL``.

        The model is loaded at once, so that a wrong one is refused before the first question.

        Raises:
            ValueError: If the text is none of them, or there is no such model.
        """
        kind, _, rest = text.partition(":")
        share, _, model = rest.partition(":")
        try:
            threshold = None if text == "exact" else float(share)
        except ValueError:
            threshold = -1.0
        if text != "exact" and (kind != "semantic" or not 0 < threshold <= 1):
            raise ValueError(
                "a response cache is 'exact' or 'semantic:THRESHOLD[:MODEL]' with a threshold in "
                f"(0, 1], got '{text}'"
            )
        made = cls(store, threshold, model or MODEL)
        if threshold is not None:
            Embedder.of(store, made.model)
        return made

    def find(self, scope: str, context: Ids, query: Ids, question: str) -> Response | None:
        """The answer to a question over a context, or None.

        Args:
            scope: All that decides an answer beside the prompt, see `scope_of`.
            context: Tokens before the question.
            query: Tokens of the question.
            question: Its text; empty: only the same prompt is found.
        """
        place = _mixed(scope, context)
        if (found := self._get(place, query)) is not None:
            return found
        if self.threshold is None or not question:
            return None
        for hit in self._list(place).find(self._vector(question)):
            if hit.similarity >= self.threshold:
                return self._get(place, (), hit.key, min(hit.similarity, 1.0))
        return None

    def keep(
        self,
        scope: str,
        context: Ids,
        query: Ids,
        question: str,
        facts: Mapping[str, Any],
        **about: Any,
    ) -> None:
        """Keeps an answer: ``facts`` in plain JSON; ``about`` it as `ChunkStore.put` takes it."""
        place = _mixed(scope, context)
        data = (text_bytes(json.dumps(facts)).to(torch.uint8),)
        keys = [(chunk_key(place, query), query)]
        if self.threshold is not None and question:
            # Found without knowing its question, so it is verified by its place alone.
            keys.append((chunk_key(place, query, {"similar": True}), ()))
        for key, ids in keys:
            record = Record(data, torch.tensor(ids, dtype=torch.int64), place)
            keep(self.store, key, record, **about)
        if len(keys) > 1:
            self._list(place).add(keys[-1][0], len(query), self._vector(question))

    def _get(
        self, place: str, ids: Sequence[int], key: str | None = None, similarity: float = 1.0
    ) -> Response | None:
        record = self.store.get(key or chunk_key(place, ids), ids, place, Record)
        if record is None:
            return None
        facts = json.loads(bytes(record.data[0].tolist()))
        return Response(facts, similarity, record.num_bytes)

    def _list(self, place: str) -> Nearest:
        return Nearest(self.store, _mixed(place, (), self.model), most=256)

    def _vector(self, question: str) -> torch.Tensor:
        return Embedder.of(self.store, self.model)([question])[0]


def scope_of(*parts: Any) -> str:
    """A digest of what decides an answer beside its prompt: fingerprint, method, settings."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _mixed(scope: str, context: Ids, model: str = "") -> str:
    return scope_of(scope, context, model)
