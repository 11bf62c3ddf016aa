"""Chunks of the folder read layer by layer in the background, while earlier layers compute."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from blocktune.cache.chunk_file import ChunkFile, chunk_path, open_file
from blocktune.cache.chunk_kv import ChunkKV
from blocktune.cache.store import ChunkStore, Lookup


class Damaged(ValueError):
    """A layer that was to be used is not what was written."""


class StreamedKV:
    """One chunk whose layers arrive one after the other; read like a `ChunkKV`.

    Its header, token ids and model are verified before it is handed out, each layer before it is
    used.
    """

    kind = ChunkKV.kind

    def __init__(self, key: str, file: ChunkFile, stream: Stream):
        """Reads ``file``, stored under ``key``, when ``stream`` is started."""
        self.key, self._file, self._stream = key, file, stream
        self.token_ids, self.fingerprint = file.token_ids, file.fingerprint
        self.num_tokens = self.token_ids.shape[0]
        self.num_layers, self.origin, self.num_bytes = (
            file.fact(name) for name in ("num_layers", "origin", "num_bytes")
        )
        self._layers: list[Future] = []
        self.keys, self.values = _Half(self, 0), _Half(self, 1)

    matches = ChunkKV.matches

    def to(self, device: torch.device | str) -> Self:
        """Itself: layers go to the store's device as they arrive."""
        return self

    def submit(self, layer: int, pool: ThreadPoolExecutor) -> None:
        """Asks for the next layer."""
        self._layers.append(pool.submit(self._read, layer))

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer; waits for them.

        Raises:
            Damaged: If they do not verify.
        """
        started = time.perf_counter()
        try:
            return self._layers[layer].result()
        except ValueError as error:
            raise Damaged(f"chunk {self.key[:12]}, layer {layer}: {error}") from None
        finally:
            self._stream.waited_s += time.perf_counter() - started

    def whole(self) -> ChunkKV:
        """All layers, which must have arrived."""
        pairs = [future.result() for future in self._layers]
        keys, values = zip(*pairs, strict=True)
        return ChunkKV(keys, values, self.token_ids, self.fingerprint, self.origin)

    def _read(self, layer: int) -> tuple[Tensor, Tensor]:
        started = time.perf_counter()
        pair = tuple(self._file.read(f"{half}.{layer}") for half in ("key", "value"))
        moved = tuple(tensor.to(self._stream.store.device) for tensor in pair)
        self._stream.read_s += time.perf_counter() - started
        return moved


class _Half(Sequence):
    """All layers' keys, or all layers' values."""

    def __init__(self, kv: StreamedKV, half: int):
        self._kv, self._half = kv, half

    def __getitem__(self, layer: int) -> Tensor:
        return self._kv.layer(layer)[self._half]

    def __len__(self) -> int:
        return self._kv.num_layers


class Stream:
    """The chunks of one forward pass that are read while it runs; a context manager.

    Attributes:
        store: Where they lie.
        chunks: Those that are read from the folder.
        read_s: Seconds that the background spent on reading, verifying and moving.
        waited_s: Seconds that the pass waited for them.
    """

    def __init__(self, store: ChunkStore):
        """Nothing is read before `start`."""
        self.store = store
        self.chunks: list[StreamedKV] = []
        self.read_s = self.waited_s = 0.0
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="blocktune-load")

    @property
    def num_bytes(self) -> int:
        """Bytes of the chunks that are read from the folder."""
        return sum(chunk.num_bytes for chunk in self.chunks)

    def lookup(self, key: str, token_ids: Sequence[int] | Tensor, fingerprint: str) -> Lookup:
        """As `ChunkStore.lookup`, but a chunk in the folder is only opened."""
        found = self.store.lookup(key, token_ids, fingerprint, read=self._open, keep=False)
        if found.tier == "disk":
            self.chunks.append(found.kv)
        return found

    def start(self) -> None:
        """Begins to read: the first layer of all chunks, then the second, and so on."""
        for layer in range(max((chunk.num_layers for chunk in self.chunks), default=0)):
            for chunk in self.chunks:
                chunk.submit(layer, self._pool)

    def keep(self) -> None:
        """Puts the chunks that were read into the store's memory."""
        for chunk in self.chunks:
            self.store.remember(chunk.key, chunk.whole())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _open(self, folder: Path, key: str, kind: type[ChunkKV]) -> StreamedKV:
        return StreamedKV(key, ChunkFile(open_file(chunk_path(folder, key)), key, kind), self)
