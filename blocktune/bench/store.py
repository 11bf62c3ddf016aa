"""How fast a store gives back the chunks of a prompt, against copying the same bytes."""

from __future__ import annotations

import os
import random
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch

from blocktune.bench.reuse import ReuseBench, ratios, spread, take_turns, usage_of
from blocktune.cache import ChunkKV, ChunkStore, chunk_key
from blocktune.cache.codecs import codec_error
from blocktune.cache.config import CODECS, StoreConfig
from blocktune.cache.ledger import INDEX, Ledger, Row
from blocktune.methods import build
from blocktune.provenance import provenance

TARGETS = {"disk_over_copy": 0.6, "memory_over_copy": 0.8, "lookup_p99_s": 1e-3}
"""Goals of the project: shares of the copy bandwidth, and a look-up among a million keys."""
PARTS = ("lookup_s", "load_s", "relocate_s")


def bench_store(
    setting: ReuseBench, folder: Path | None = None, keys: int = 1_000_000
) -> dict[str, object]:
    """Times loading and joining a prompt's chunks, look-ups among ``keys``, and what codecs cost.

    Copying reads the same files into new memory, or clones the same tensors. All files are in the
    page cache. ``ratios`` are of bandwidths. Chunks are written into ``folder``, by default the
    system's temporary one.
    """
    torch.set_num_threads(setting.threads)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        disk = setting.engine(ChunkStore(0, Path(place) / "disk"))
        memory = setting.engine(ChunkStore(1 << 40))
        pieces, naive = setting.pieces(len(disk.tokenizer)), build("naive")
        for engine in (disk, memory):
            usage_of(engine, pieces, naive)  # encodes
        files = sorted((Path(place) / "disk").rglob("*.safetensors"))
        held = list(memory.store.held().values())

        def load(engine) -> float:
            ttft = asdict(usage_of(engine, pieces, naive).ttft)
            return sum(ttft[name] for name in PARTS)

        works = {
            "disk": lambda: load(disk),
            "read": lambda: _read(files),
            "memory": lambda: load(memory),
            "clone": lambda: _clone(held),
        }
        times = take_turns(works, setting.repeats)
        lookups = _lookups(Path(place) / "many", keys)
    chunk = next(entry for entry in held if isinstance(entry, ChunkKV))
    return {
        "ratios": {
            "disk_over_copy": spread(ratios(times, "read", "disk")),
            "memory_over_copy": spread(ratios(times, "clone", "memory")),
        },
        "seconds": {name: spread(one) for name, one in times.items()},
        "bytes": sum(entry.num_bytes for entry in held),
        "lookup": {"keys": keys} | lookups,
        "codecs": {codec: codec_error(chunk, codec, disk.state.rope)._asdict() for codec in CODECS},
        "targets": TARGETS,
        "setting": asdict(setting),
        "provenance": provenance(),
    }


def _read(files: list[Path]) -> float:
    start, held = time.perf_counter(), []  # as a prompt's chunks, all are held
    for path in files:
        held.append(torch.empty(path.stat().st_size, dtype=torch.uint8))
        descriptor = os.open(path, os.O_RDONLY)
        os.preadv(descriptor, [memoryview(held[-1].numpy())], 0)
        os.close(descriptor)
    return time.perf_counter() - start


def _clone(entries: list) -> float:
    start = time.perf_counter()
    held = [tensor.clone() for entry in entries for _, tensor in entry.tensors()]
    seconds = time.perf_counter() - start
    del held
    return seconds


def _lookups(folder: Path, count: int, timed: int = 2000) -> dict[str, float]:
    """Seconds of look-ups in a folder whose index holds ``count`` keys: hits and misses."""
    store = ChunkStore(config=StoreConfig(folder=folder, memory=0, disk=1 << 50))
    draw = random.Random(0)
    rows = (
        Row(key=f"{draw.getrandbits(256):064x}", size=1000, uses=1, created=n, used=n)
        for n in range(count)
    )
    Ledger(folder / INDEX).fill(rows)
    kv = ChunkKV((torch.ones(1, 4, 8),), (torch.ones(1, 4, 8),), torch.arange(4), "ab" * 32)
    keys = [chunk_key(kv.fingerprint, [n]) for n in range(timed)]
    for key in keys[::2]:
        store.put(key, kv)
    times: dict[str, list[float]] = {"hit": [], "miss": []}
    for index, key in enumerate(keys):
        found = store.lookup(key, kv.token_ids, kv.fingerprint)
        times["miss" if index % 2 else "hit"].append(found.lookup_s + found.load_s)
    return {
        f"{name}_{label}_s": sorted(one)[int(len(one) * share)]
        for name, one in times.items()
        for label, share in (("p50", 0.5), ("p99", 0.99))
    }


STORE = ReuseBench(width=512, intermediate=512, heads=8, kv_heads=8, layers=12, threads=2)
"""A narrow model with 24 kB a token: encoding is quick, the chunks are large."""
QUICK = replace(STORE, tokens=300, chunk=64, question=16, layers=2, repeats=1, threads=1)
