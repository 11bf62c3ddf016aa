"""Loads chunks layer by layer in the background, and chooses how much to recompute meanwhile.

Loading layer ``i + 1`` and recomputing layer ``i`` run at the same time, so recomputing a larger
share costs nothing as long as a layer takes longer to load: the controller chooses the share.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Self

from torch import Tensor

from blocktune.cache import ChunkKV, ChunkStore, Lookup
from blocktune.cache.chunk_file import ChunkFile, FileKV
from blocktune.methods import ChunkLoader, Selection

KEEP = 0.8  # weight of what was measured before; the rest is the latest measurement's


@dataclass(frozen=True)
class LoadingChoice:
    """What the controller chose for one batch, and from what it measured; None before that.

    ``tier`` is where the chunks are kept from now on: ``disk`` where loading hides behind
    recomputing the least share, else ``memory``.
    """

    ratio: float  # share of the context tokens that is recomputed
    tier: str
    bytes_read: int  # from the folder
    load_s: float | None  # seconds to load a layer at the measured bandwidth
    recompute_s: float | None  # seconds to recompute ``ratio`` of a layer


class LoadingController:
    """Measures bandwidth and compute, and chooses by them. Thread-safe.

    Source: CacheBlend arXiv:2405.16444, section 5: the largest ratio whose recomputing a layer
    takes no longer than loading one, never below a floor; and the cheapest device from which
    loading takes no longer than recomputing the floor.
    """

    @classmethod
    def of(cls, store: ChunkStore, fingerprint: str) -> Self:
        """The one of a store and model in this process."""
        return store.notes.setdefault((cls, fingerprint), cls())

    def __init__(self):
        self.bytes_per_s: float | None = None
        self.row_layer_s: float | None = None
        self._lock = threading.Lock()

    def saw_reading(self, num_bytes: int, seconds: float) -> None:
        """Takes a measurement of loading."""
        if num_bytes and seconds > 0:
            with self._lock:
                self.bytes_per_s = _mixed(self.bytes_per_s, num_bytes / seconds)

    def saw_computing(self, row_layers: int, seconds: float) -> None:
        """Takes a measurement of computing rows, counted once in each layer."""
        if row_layers and seconds > 0:
            with self._lock:
                self.row_layer_s = _mixed(self.row_layer_s, seconds / row_layers)

    def choose(
        self, floor: float, context_tokens: int, num_layers: int, num_bytes: int
    ) -> LoadingChoice:
        """The share to recompute, at least ``floor``, and the tier, for bytes from the folder."""
        with self._lock:
            bandwidth, row_s = self.bytes_per_s, self.row_layer_s
        ratio, tier, load_s = floor, "memory", None if num_bytes else 0.0
        if num_bytes and bandwidth is not None:
            load_s = num_bytes / bandwidth / num_layers
        whole_s = None if row_s is None else row_s * context_tokens
        if whole_s and load_s is not None:
            ratio = min(1.0, max(floor, load_s / whole_s))
            tier = "disk" if num_bytes and load_s <= floor * whole_s else "memory"
        recompute_s = None if whole_s is None else ratio * whole_s
        return LoadingChoice(ratio, tier, num_bytes, load_s, recompute_s)


def _mixed(old: float | None, new: float) -> float:
    return new if old is None else KEEP * old + (1 - KEEP) * new


class StreamedKV(FileKV):
    """One chunk whose layers arrive one after the other, each verified when it does.

    They are read when ``loader`` is started.
    """

    def __init__(self, file: ChunkFile, loader: LayerLoader):
        super().__init__(file)
        self._loader = loader
        self._layers: list[Future] = []

    def submit(self, layer: int, pool: ThreadPoolExecutor) -> None:
        """Lets a thread read the next layer."""
        self._layers.append(pool.submit(self._read, layer))

    def tensor(self, name: str) -> Tensor:
        half, _, layer = name.partition(".")
        started = time.perf_counter()
        try:
            return self._layers[int(layer)].result()[half == "value"]
        finally:
            self._loader.waited_s += time.perf_counter() - started

    def read_into(self, name: str, out: Tensor) -> None:
        out.copy_(self.tensor(name))

    def whole(self) -> ChunkKV:
        """All layers in memory."""
        pairs = [future.result() for future in self._layers]
        keys, values = zip(*pairs, strict=True)
        return ChunkKV(keys, values, self.token_ids, self.fingerprint, self.origin)

    def _read(self, layer: int) -> tuple[Tensor, Tensor]:
        started = time.perf_counter()
        pair = tuple(self.file.tensor(f"{half}.{layer}") for half in ("key", "value"))
        moved = tuple(tensor.to(self._loader.store.device) for tensor in pair)
        self._loader.read_s += time.perf_counter() - started
        return moved


class LayerLoader(ChunkLoader):
    """Reads the chunks of a batch layer by layer in the background, and chooses what to recompute.

    The report is the controller's `LoadingChoice`, or None where the share is fixed.
    """

    def __init__(self, store: ChunkStore, controller: LoadingController):
        self.store, self.controller = store, controller
        self.chunks: list[StreamedKV] = []  # those that are read from the folder
        self.read_s = 0.0  # seconds of the background: reading, verifying and moving
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="blocktune-load")

    @property
    def num_bytes(self) -> int:
        """Bytes of all chunks that are read."""
        return sum(chunk.num_bytes for chunk in self.chunks)

    def lookup(self, key: str, token_ids: Sequence[int] | Tensor, fingerprint: str) -> Lookup:
        found = self.store.lookup(key, token_ids, fingerprint, read=self._open, keep=False)
        if found.tier == "disk":
            self.chunks.append(found.kv)
        return found

    def start(self) -> None:
        for layer in range(max((chunk.num_layers for chunk in self.chunks), default=0)):
            for chunk in self.chunks:
                chunk.submit(layer, self._pool)

    def choose(self, selection: Selection, context_tokens: int, num_layers: int) -> Selection:
        floor = getattr(selection, "ratio", None)  # the smallest share
        if floor is None:
            return selection
        self.report = self.controller.choose(floor, context_tokens, num_layers, self.num_bytes)
        return selection.with_budget(self.report.ratio)

    def done(self, row_layers: int, compute_s: float) -> None:
        self.controller.saw_computing(row_layers, compute_s)
        self.controller.saw_reading(self.num_bytes, self.read_s)
        if self.report is None or self.report.tier == "memory":
            for chunk in self.chunks:
                self.store.remember(chunk.key, chunk.whole())

    def __exit__(self, *exception) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _open(self, file: ChunkFile) -> StreamedKV:
        return StreamedKV(file, self)
