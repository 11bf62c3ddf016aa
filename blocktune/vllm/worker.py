"""The connector's half in a worker: from the store into this rank's paged cache, in threads.

Chunks are read, verified and packed once; hot ones stay in memory. A load copies them to the device
layer by layer, moves the keys to their positions there, and writes them through vLLM's own kernel,
which knows the cache's layout.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from cachetools import LRUCache
from torch import Tensor

from blocktune.cache import ChunkKV, ChunkStore
from blocktune.cache.shelf import StoreView
from blocktune.positions import LayerRope, Rotation, rotate_keys
from blocktune.vllm.plan import LoadPlan, Segment, heads_of, slots_of

if TYPE_CHECKING:
    from blocktune.vllm.scheduler import Load

IDLE_S = 0.002
"""Seconds that a step without a forward pass waits for loads, rather than spin."""
_LOG = logging.getLogger(__name__)


class Missing(ValueError):
    """A chunk that is not in the store, or is damaged."""


class Packed(NamedTuple):
    """One segment's keys and values of this rank's heads, ready to copy.

    Attributes:
        origin: Position at which the first token was encoded.
        buffer: All of them, one after the other.
        states: Keys and values ``(S, K, D)`` of each layer in turn: views of the buffer.
    """

    origin: int
    buffer: Tensor
    states: list[Tensor]

    @classmethod
    def of(cls, kv: ChunkKV, rank: int, size: int) -> Packed:
        """Cuts the heads of a tensor parallel rank out of a chunk."""
        own = [
            states[heads_of(rank, size, states.shape[0])].transpose(0, 1)
            for pair in zip(kv.keys, kv.values, strict=True)
            for states in pair
        ]
        sizes = [states.numel() for states in own]
        pinned = torch.cuda.is_available()
        buffer = torch.empty(sum(sizes), dtype=kv.dtype, pin_memory=pinned)
        views = [
            part.view(states.shape).copy_(states)
            for part, states in zip(buffer.split(sizes), own, strict=True)
        ]
        return cls(kv.origin, buffer, views)


class _Place(NamedTuple):
    """An attention layer of this rank: the module, and its group in vLLM's cache."""

    module: Any
    group: int


class WorkerSide:
    """Loads in the background; a request waits for its own load only.

    Args:
        view: The store.
        groups: Names of the layers in each kv cache group, and the group's block size.
        layer_index: Index of a layer of the decoder by its name in vLLM.
        dtype: Of keys and values in vLLM's kernels.
        num_layers: Of the whole decoder.
        rank: Tensor parallel rank.
        size: Tensor parallel ranks.
        host_bytes: Memory for hot chunks.
        threads: Loads at a time.
    """

    def __init__(
        self,
        view: StoreView,
        groups: list[tuple[list[str], int]],
        layer_index: Mapping[str, int],
        dtype: torch.dtype,
        num_layers: int,
        rank: int,
        size: int,
        host_bytes: int,
        threads: int,
    ):
        self.view, self.dtype, self.num_layers = view, dtype, num_layers
        self.rank, self.size = rank, size
        self.store = ChunkStore(config=view.config)  # `_hot` keeps what is read, packed
        self._hot = LRUCache(host_bytes, getsizeof=lambda packed: packed.buffer.nbytes)
        self._lock = threading.Lock()
        self.counts: Counter[str] = Counter()
        self._groups = [block_size for _, block_size in groups]
        self._names = {
            name: (layer_index[name], number)
            for number, (names, _) in enumerate(groups)
            for name in names
        }
        self._places: dict[int, _Place] = {}
        self._rope: dict[str, _Rope] = {}
        self._pool = ThreadPoolExecutor(threads, "blocktune-load")
        self._jobs: dict[str, Future[None]] = {}
        self._idle = False
        self._stream: torch.cuda.Stream | None = None

    def start(self, loads: list[Load], modules: Mapping[str, Any], idle: bool) -> None:
        """Begins loads.

        Args:
            loads: Of this step.
            modules: vLLM's layers by name.
            idle: Whether the step has no forward pass.
        """
        self._idle = idle
        if loads and not self._places:
            self._places = {
                index: _Place(modules[name], group) for name, (index, group) in self._names.items()
            }
        ready = None
        if loads and torch.cuda.is_available():
            # After what the device still does to these blocks, such as zeroing.
            self._stream = self._stream or torch.cuda.Stream()
            ready = torch.cuda.current_stream().record_event()
        for load in loads:
            self._jobs[load.request_id] = self._pool.submit(self._run, load, ready)

    def finished(self) -> tuple[set[str], set[str]]:
        """Requests whose loads ended since the last call, and those of them that failed."""
        if self._idle and self._jobs:
            wait(self._jobs.values(), IDLE_S, FIRST_COMPLETED)
        ended = {name for name, job in self._jobs.items() if job.done()}
        failed = set()
        for name in ended:
            job = self._jobs.pop(name)
            if (error := job.exception()) is None:
                self.counts.update(job.result())
            else:
                failed.add(name)
                self.counts["failed"] += 1
                _LOG.warning("request %s fails: %s", name, error)
        return ended, failed

    def close(self) -> None:
        """Ends background work."""
        self._pool.shutdown(cancel_futures=True)

    @torch.inference_mode()
    def _run(self, load: Load, ready: torch.cuda.Event | None) -> Counter[str]:
        started, counts = time.perf_counter(), Counter(loads=1)
        if load.plan is None:
            raise Missing(load.fault)
        with nullcontext() if ready is None else torch.cuda.stream(self._stream):
            if ready is not None:
                self._stream.wait_event(ready)
            self._fill(load, load.plan, counts)
            if ready is not None:
                self._stream.synchronize()
        counts["tokens"] = load.plan.num_tokens - load.start
        counts["load_us"] = int(1e6 * (time.perf_counter() - started))
        return counts

    def _fill(self, load: Load, plan: LoadPlan, counts: Counter[str]) -> None:
        wanted, rope = plan.wanted(load.start), self._frequencies(plan.fingerprint)
        packed = [self._packed(plan, index, counts) for index in wanted]
        device = next(iter(self._places.values())).module.kv_cache.device
        shift = _shifts([plan.segments[index] for index in wanted], packed).to(device)
        slots, first = [], plan.starts[wanted[0]]
        for blocks, size in zip(load.blocks, self._groups, strict=True):
            rows, where = slots_of(blocks, size, load.start, plan.num_tokens)
            slots.append(((rows - first).to(device), where.to(device)))
        turns: dict[int, Rotation] = {}
        for index, (module, group) in self._places.items():
            rows, where = slots[group]
            keys, values = (
                torch.cat([one.states[part].to(device, non_blocking=True) for one in packed])
                for part in (2 * index, 2 * index + 1)
            )
            self._require_shape(module, keys)
            name = rope.layer[index]
            if name not in turns:
                turn = Rotation.of(shift[None], rope.forms[name])
                cos, sin = turn.cos[0, 0, :, None], turn.sin[0, 0, :, None]
                turns[name] = turn._replace(cos=cos, sin=sin)
            keys = rotate_keys(keys, turns[name])
            if len(rows) < len(keys):
                keys, values = keys[rows], values[rows]
            keys, values = keys.to(self.dtype), values.to(self.dtype)
            module.impl.do_kv_cache_update(module, keys, values, module.kv_cache, where)

    def _require_shape(self, module: Any, keys: Tensor) -> None:
        wanted = (module.num_kv_heads, module.head_size)
        if tuple(keys.shape[1:]) != wanted:
            raise Missing(
                f"the chunks have (kv heads, head size) {tuple(keys.shape[1:])} on this rank, "
                f"vLLM's model {wanted}; they are of another model"
            )

    def _packed(self, plan: LoadPlan, index: int, counts: Counter[str]) -> Packed:
        key = plan.keys[index]
        with self._lock:
            held = self._hot.get(key)
        if held is not None:
            counts["host_hits"] += 1
            return held
        kv = self.store.get(key, plan.segments[index].ids, plan.fingerprint)
        if kv is None:  # an encoder verifies it too, and encodes it again
            self.view.ask_for(plan.fingerprint, [plan.segments[index].wanted])
            reason = self.store.stats().first_rejected or "it is not there"
            raise Missing(f"chunk {key[:12]} cannot be read from the store: {reason}")
        counts["store_reads"] += 1
        counts["store_bytes"] += kv.num_bytes
        packed = Packed.of(kv, self.rank, self.size)
        with self._lock, suppress(ValueError):  # larger than the memory
            self._hot[key] = packed
        return packed

    def _frequencies(self, fingerprint: str) -> _Rope:
        if fingerprint not in self._rope:
            record = self.view.manifest(fingerprint)
            if record is None:
                raise Missing(f"no manifest of {fingerprint[:12]} in '{self.view.place}'")
            rope = record["rope"]
            if len(rope["layer"]) != self.num_layers:
                raise Missing(
                    f"the chunks have {len(rope['layer'])} layers, vLLM's model {self.num_layers}; "
                    "they are of another model"
                )
            lists = [torch.tensor(one) for one in rope["frequencies"]]
            # Manifests of before these fields are of models that rotate by halves.
            given = (rope.get(name, [0] * len(lists)) for name in LayerRope._fields[1:])
            forms = [LayerRope(*one) for one in zip(lists, *given, strict=True)]
            if any(form.in_values for form in forms):
                raise Missing("the chunks hold latent keys, which this connector does not load")
            self._rope[fingerprint] = _Rope(forms, rope["layer"])
        return self._rope[fingerprint]

    def forget(self) -> None:
        """Drops the hot chunks."""
        with self._lock:
            self._hot.clear()


class _Rope(NamedTuple):
    """Rotations, and which of them each layer has."""

    forms: list[LayerRope]
    layer: list[int]


def _shifts(segments: list[Segment], packed: list[Packed]) -> Tensor:
    """How far each token's key is moved, ``(S,)``."""
    return torch.cat(
        [
            torch.full((len(segment.ids),), segment.position - one.origin)
            for segment, one in zip(segments, packed, strict=True)
        ]
    )
