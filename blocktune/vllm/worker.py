"""The connector's half in a worker: loads from the store into this rank's paged cache, in threads.

A load reads and verifies chunks (recent ones stay in memory), copies them layer by layer, moves
keys to their positions, and writes by vLLM's kernel, which knows the cache's layout. Most run
between steps; a layered one runs during the forward pass, which waits for each layer.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.models.utils import extract_layer_index

from blocktune.cache import ChunkKV, ChunkStore
from blocktune.cache.store.chunk_file import ChunkFile
from blocktune.cache.store.shelf import StoreView
from blocktune.positions import LayerRope
from blocktune.vllm.plan import NULL_BLOCK, LoadPlan, slots_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheGroupSpec

    from blocktune.vllm.scheduler import Load

IDLE_S = 0.002  # seconds that a step without a forward pass waits for loads, to avoid spinning
_LOG = logging.getLogger(__name__)


class Missing(ValueError):
    """A chunk that is not in the store, or is damaged."""


class _Rope(NamedTuple):
    """The model's rotations, and the index of each layer's."""

    forms: list[LayerRope]
    layer: list[int]


class _Part(NamedTuple):
    """Segments that are written together.

    On a CPU one, whose keys stay in the processor's cache; else all, for fewer kernel launches.
    """

    chunks: list[ChunkKV]  # their stored keys and values, of this rank's heads
    # cosines and sines of each segment's move, (segments, 2 P), for each rotation of the model
    rotations: list[Tensor]
    owner: Tensor | None  # index of each token's segment, (S,); None: no segment moves
    slots: list[tuple[Tensor, Tensor]]  # for each group, which tokens are kept, and where

    def layer(self, index: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Keys, in new memory, since they are moved in place, and values of a layer; (S, K, D).

        On a CPU the values are the chunk's own: vLLM's kernel there reads them by their strides.
        """
        pairs = [(chunk.keys[index], chunk.values[index]) for chunk in self.chunks]
        keys, values = (
            [state.to(device, non_blocking=True).transpose(0, 1) for state in states]
            for states in zip(*pairs, strict=True)
        )
        return torch.cat(keys), values[0] if device.type == "cpu" else torch.cat(values)


class _Job(NamedTuple):
    """A running load; ``layers`` has a future per layer name if a forward pass waits for them."""

    load: Load
    future: Future[Counter[str]]
    layers: dict[str, Future[torch.cuda.Event | None]]


class WorkerSide:
    """Loads chunks in the background; a request waits only for its own load.

    ``groups`` are vLLM's ``kv_cache_groups``: layers that share blocks.
    """

    def __init__(self, config: VllmConfig, groups: list[KVCacheGroupSpec]):
        extra = config.kv_transfer_config.kv_connector_extra_config
        self.view, self.dtype = StoreView(extra["store"]), config.model_config.dtype
        self.num_layers = config.model_config.hf_text_config.num_hidden_layers
        self.share = get_tensor_model_parallel_rank(), config.parallel_config.tensor_parallel_size
        host_bytes = int(float(extra.get("host_gb", 1)) * 2**30)
        self.store = ChunkStore(config=replace(self.view.config, memory=host_bytes, cpu=0))
        self.counts: Counter[str] = Counter()
        self._block_sizes = [group.kv_cache_spec.block_size for group in groups]
        self._names = {
            name: (extract_layer_index(name), number)
            for number, group in enumerate(groups)
            for name in group.layer_names
        }
        # Of each attention layer: its module, its index, and its group in vLLM's cache.
        self.places: dict[str, tuple[Any, int, int]] = {}
        self._rope: dict[str, _Rope] = {}
        self.pool = ThreadPoolExecutor(
            int(extra.get("threads", 2)),
            "blocktune-load",
            initializer=_use_one_core,
            initargs=(torch.get_num_threads(),),
        )
        self._jobs: list[_Job] = []
        self._idle = False
        self._invalid: set[int] = set()
        self._stream: torch.cuda.Stream | None = None

    def start(self, loads: list[Load], modules: Mapping[str, Any], idle: bool) -> None:
        """Begins the loads of a step; ``idle`` if it has no forward pass."""
        self._idle = idle
        if loads and not self.places:
            self.places = {name: (modules[name], *at) for name, at in self._names.items()}
        ready = None
        if loads and torch.cuda.is_available():
            # Loads wait for work that the device still does on these blocks, such as zeroing.
            self._stream = self._stream or torch.cuda.Stream()
            ready = torch.cuda.current_stream().record_event()
        for load in loads:
            layers = {name: Future() for name in self.places} if load.layered else {}
            future = self.pool.submit(self._run, load, ready, dict(layers))
            self._jobs.append(_Job(load, future, layers))

    def wait_for_layer(self, name: str) -> None:
        """Waits until a layered load has written a layer, or has failed."""
        for job in self._jobs:
            # Layers that stay in `layers` were not waited for.
            written = job.layers.pop(name, None)
            if written is not None and (event := written.result()) is not None:
                torch.cuda.current_stream().wait_event(event)

    def finished(self) -> tuple[set[str], set[str]]:
        """Requests whose loads ended since the last call, and those among them that failed.

        Layered loads are not included: see `take_invalid`.
        """
        waiting = [job.future for job in self._jobs if not job.load.layered]
        if self._idle and waiting:
            wait(waiting, IDLE_S, FIRST_COMPLETED)
        ended, failed, running = set(), set(), []
        for job in self._jobs:
            name = job.load.request_id
            if job.load.layered:
                self._invalid.update(() if self._loaded(job) else job.load.blocks[0])
            elif job.future.done():
                ended.add(name)
                failed.update(() if self._loaded(job) else {name})
            else:
                running.append(job)
        self._jobs = running
        return ended, failed

    def _loaded(self, job: _Job) -> bool:
        error = job.future.exception()
        if error is None and job.layers:  # for example, a captured graph calls no hooks
            error = RuntimeError("the forward pass did not wait for each layer")
        if error is None:
            self.counts.update(job.future.result())
        else:
            self.counts["failed"] += 1
            _LOG.warning("request %s fails: %s", job.load.request_id, error)
        return error is None

    def take_invalid(self) -> set[int]:
        """Blocks of layered loads that failed since the last call."""
        taken, self._invalid = self._invalid - {NULL_BLOCK}, set()
        return taken

    @torch.inference_mode()
    def _run(
        self,
        load: Load,
        ready: torch.cuda.Event | None,
        layers: dict[str, Future[torch.cuda.Event | None]],
    ) -> Counter[str]:
        started, counts = time.perf_counter(), Counter(loads=1, layered=int(load.layered))
        try:
            if load.plan is None:
                raise Missing(load.fault)
            with nullcontext() if ready is None else torch.cuda.stream(self._stream):
                if ready is not None:
                    self._stream.wait_event(ready)
                for name in self._fill(load, load.plan, counts):
                    if name in layers:
                        event = None if ready is None else self._stream.record_event()
                        layers.pop(name).set_result(event)
                if ready is not None:
                    self._stream.synchronize()
        finally:
            for future in layers.values():
                future.set_result(None)
        counts["tokens"] = load.plan.num_tokens - load.start
        counts["load_us"] = int(1e6 * (time.perf_counter() - started))
        return counts

    def _fill(self, load: Load, plan: LoadPlan, counts: Counter[str]) -> Iterator[str]:
        """Writes layer by layer; yields the name of each layer once it is written."""
        rope = self._frequencies(plan.fingerprint)
        chunks = self._chunks(plan, load.start, counts)
        device = next(iter(self.places.values()))[0].kv_cache.device
        groups = [[index] for index in chunks] if device.type == "cpu" else [list(chunks)]
        parts = [self._part(load, plan, {i: chunks[i] for i in g}, rope, device) for g in groups]
        for name, (module, index, group) in self.places.items():
            for part in parts:
                rows, where = part.slots[group]
                if not len(rows):  # outside of the window
                    continue
                keys, values = part.layer(index, device)
                wanted = module.num_kv_heads, module.head_size
                if keys.shape[1:] != wanted:
                    raise Missing(
                        f"the chunks have (kv heads, head size) {tuple(keys.shape[1:])} on this "
                        f"rank, vLLM's model {wanted}; they belong to another model"
                    )
                form = rope.forms[rope.layer[index]]
                if part.owner is not None and len(form.inv_freq):
                    keys = keys.float()  # bfloat16 is too coarse for the cosines
                    rotation, is_neox = part.rotations[rope.layer[index]], not form.interleaved
                    states = keys.flatten(1), None, keys.shape[-1]
                    ops.rotary_embedding(part.owner, *states, rotation, is_neox, form.start)
                if len(rows) < len(keys):
                    keys, values = keys[rows], values[rows]
                keys, values = keys.to(self.dtype), values.to(self.dtype)
                module.impl.do_kv_cache_update(module, keys, values, module.kv_cache, where)
            yield name

    def _part(
        self, load: Load, plan: LoadPlan, chunks: dict[int, ChunkKV], rope: _Rope, device
    ) -> _Part:
        numbers = list(chunks)
        first, stop = plan.starts[numbers[0]], plan.starts[numbers[-1] + 1]
        slots = []
        for blocks, size in zip(load.blocks, self._block_sizes, strict=True):
            rows, where = slots_of(blocks, size, max(first, load.start), stop)
            slots.append(((rows - first).to(device), where.to(device)))
        moves = torch.tensor([plan.segments[i].position - kv.origin for i, kv in chunks.items()])
        owner, rotations = None, []
        if moves.any():
            lengths = torch.tensor([len(plan.segments[number].ids) for number in numbers])
            owner = torch.arange(len(numbers)).repeat_interleave(lengths).to(device)
            angles = [moves[:, None].float() * form.inv_freq for form in rope.forms]
            rotations = [torch.cat([a.cos(), a.sin()], -1).to(device) for a in angles]
        return _Part(list(chunks.values()), rotations, owner, slots)

    def _chunks(self, plan: LoadPlan, start: int, counts: Counter[str]) -> dict[int, ChunkKV]:
        """All segments from token ``start`` on; missing ones are queued and raise `Missing`."""
        read, chunks, lacking = partial(ChunkFile.entry, share=self.share), {}, []
        reason = "they are not there"
        for index in plan.wanted(start):
            key, segment = plan.keys[index], plan.segments[index]
            hit = self.store.lookup(key, segment.ids, plan.fingerprint, read=read)
            if hit.kv is None:  # missing, or damaged: then the encoder also finds it damaged
                lacking.append(segment.wanted)
                reason = hit.reason or reason
                continue
            chunks[index] = hit.kv
            if hit.tier == "memory":
                counts["host_hits"] += 1
            else:
                counts["store_reads"] += 1
                counts["store_bytes"] += hit.kv.num_bytes
        if lacking:
            self.view.queue.add(plan.fingerprint, lacking)
            raise Missing(
                f"{len(lacking)} of {len(plan.segments)} segments cannot be read from the store "
                f"'{self.view.place}': {reason}; encode them (`blocktune encode --follow`) and ask "
                "again"
            )
        return chunks

    def _frequencies(self, fingerprint: str) -> _Rope:
        if fingerprint in self._rope:
            return self._rope[fingerprint]
        manifest = self.view.manifest(fingerprint)
        if manifest is None:
            raise Missing(f"no manifest of {fingerprint[:12]} in '{self.view.place}'")
        rope = manifest["rope"]
        if len(rope["layer"]) != self.num_layers:
            raise Missing(
                f"the chunks have {len(rope['layer'])} layers, vLLM's model {self.num_layers}; "
                "they belong to another model"
            )
        inv_freqs = [torch.tensor(values) for values in rope["frequencies"]]
        # Older manifests lack the other fields: their models rotate by halves.
        others = (rope.get(name, [0] * len(inv_freqs)) for name in LayerRope._fields[1:])
        forms = [LayerRope(*values) for values in zip(inv_freqs, *others, strict=True)]
        if any(form.in_values for form in forms):
            raise Missing("the chunks hold latent keys, which this connector does not load")
        return self._rope.setdefault(fingerprint, _Rope(forms, rope["layer"]))


def _use_one_core(usual: int) -> None:
    """Lets this thread's kernels use one core: they are too small to gain by several.

    vLLM on a CPU replaces `torch.set_num_threads`, which would also change the number for threads
    that begin later; here they keep the ``usual`` one.
    """
    torch.get_num_threads()  # otherwise the first kernel sets this thread's number to the usual one
    torch._C.set_num_threads(1)
    other = threading.Thread(target=torch._C.set_num_threads, args=(usual,))
    other.start()
    other.join()
