"""Sentence embeddings, computed once for each text: for recycling, answers and retrieval."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from blocktune.cache.fingerprint import chunk_key, weights_hash
from blocktune.cache.records import Record, keep, text_bytes
from blocktune.cache.store import ChunkStore

MODEL = "sentence-transformers/all-MiniLM-L6-v2"
"""The default: 384 numbers a text, of its first 256 word pieces."""


class Embedder:
    """A model of sentence-transformers whose results are kept in a store.

    Args:
        model: Folder or name on the Hub, or a loaded `SentenceTransformer`.
        store: Where embeddings are kept; None: nowhere.

    Raises:
        ValueError: If sentence-transformers is not installed, or there is no such model.
    """

    def __init__(self, model: Any = MODEL, store: ChunkStore | None = None):
        self.store = store
        self.model = _load(model) if isinstance(model, str) else model
        self.fingerprint = weights_hash(self.model)

    @classmethod
    def of(cls, store: ChunkStore, model: str) -> Embedder:
        """The one that all users of a store share while the process lives."""
        if (Embedder, model) not in store.notes:
            store.notes[Embedder, model] = cls(model, store)
        return store.notes[Embedder, model]

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Vectors of length 1, ``(N, D)`` float32 on the CPU."""
        found = {text: self._known(text) for text in texts}
        new = [text for text, vector in found.items() if vector is None]
        if new:
            started = time.perf_counter()
            made = self.model.encode(
                new, convert_to_tensor=True, normalize_embeddings=True, show_progress_bar=False
            )
            seconds = (time.perf_counter() - started) / len(new)
            for text, vector in zip(new, made.float().cpu(), strict=True):
                found[text] = vector
                if self.store is not None:
                    ids = text_bytes(text)
                    record = Record((vector,), ids, self.fingerprint)
                    keep(self.store, chunk_key(self.fingerprint, ids), record, seconds=seconds)
        return torch.stack([found[text] for text in texts])

    def _known(self, text: str) -> Tensor | None:
        if self.store is None:
            return None
        ids = text_bytes(text)
        record = self.store.get(chunk_key(self.fingerprint, ids), ids, self.fingerprint, Record)
        return None if record is None else record.data[0].cpu()


def _load(name: str) -> Any:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise ValueError(
            "sentence embeddings need the package sentence-transformers; run "
            "pip install 'blocktune[recycle]'"
        ) from None
    try:
        return SentenceTransformer(name, device="cpu")
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"cannot load an embedding model from '{name}': {reason}") from None
