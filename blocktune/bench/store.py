"""Benchmark of the chunk store: loading a prompt's chunks compared with copying their bytes."""

from __future__ import annotations

import ctypes
import random
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from blocktune.bench.reuse import ReuseBench, ratios, spread, take_turns, threads
from blocktune.cache import ChunkKV, ChunkStore, PrefixTree, chunk_key, cut_exact
from blocktune.cache.store.chunk_file import SETTLED_S
from blocktune.cache.store.codecs import encoded, round_trip
from blocktune.cache.store.config import CODECS, StoreConfig
from blocktune.cache.store.ledger import INDEX, Ledger, Row
from blocktune.engine import Engine
from blocktune.engine.assemble import from_chunks
from blocktune.engine.state import ServedBatch
from blocktune.methods import build
from blocktune.positions import RopeSpec
from blocktune.provenance import provenance


def bench_store(
    setting: ReuseBench, folder: Path | None = None, keys: int = 1_000_000
) -> dict[str, object]:
    """Times loading and joining a prompt's chunks, and look-ups among ``keys``; measures codecs.

    The baseline reads the same files, or copies the same tensors, also to memory that was used
    before. All files are in the page cache and verified. ``ratios`` compare bandwidths. Chunks are
    written into ``folder``, by default a new one.
    """
    with suppress(OSError, AttributeError):  # another C library than glibc
        mallopt = ctypes.CDLL(None).mallopt  # freed memory is kept: new pages are slow
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        mallopt(-4, 0)  # M_MMAP_MAX
    with tempfile.TemporaryDirectory(dir=folder) as place, threads(setting.threads):
        disk = setting.engine(ChunkStore(0, Path(place) / "disk"))
        memory = setting.engine(ChunkStore(1 << 40))
        pieces = setting.pieces(len(disk.tokenizer))
        moved = disk.lay_out(pieces, build("naive"), 1)

        def load(engine: Engine) -> None:  # from token ids to a cache that holds chunks in place
            from_chunks(ServedBatch.stacked(engine.state, [moved], [pieces], build("naive")))

        def read() -> None:
            for path, buffer in zip(files, buffers, strict=True):
                with path.open("rb", buffering=0) as file:
                    file.readinto(buffer)

        works = {"disk": partial(load, disk), "memory": partial(load, memory)}
        for encode in works.values():
            encode()
        files = sorted((Path(place) / "disk").rglob("*.safetensors"))
        held = list(memory.store.held().values())
        time.sleep(SETTLED_S + 0.1)  # a younger file is verified at each load
        tensors = [tensor for entry in held for _, tensor in entry.tensors()]
        copies = [tensor.clone() for tensor in tensors]
        works["copy"] = lambda: [new.copy_(old) for new, old in zip(copies, tensors, strict=True)]
        buffers, works["read"] = [bytearray(path.stat().st_size) for path in files], read
        times = take_turns(works, setting.repeats)
        lookups = _lookups(Path(place) / "many", keys)
    chunk = next(entry for entry in held if isinstance(entry, ChunkKV))
    return {
        "ratios": {
            "disk_over_copy": spread(ratios(times, "read", "disk")),
            "memory_over_copy": spread(ratios(times, "copy", "memory")),
        },
        "seconds": {name: spread(seconds) for name, seconds in times.items()},
        "bytes": sum(entry.num_bytes for entry in held),
        "lookup": {"keys": keys} | lookups,
        "prefixes": {"tokens": keys} | _matches(keys),
        "codecs": {codec: codec_error(chunk, codec, disk.state.rope) for codec in CODECS},
        "setting": asdict(setting),
        "provenance": provenance(),
    }


def codec_error(entry: ChunkKV, codec: str, rope: RopeSpec | None = None) -> dict[str, float]:
    """Bytes per token of a chunk's file, and root mean square errors of its keys and values.

    Errors are relative, over all layers; keys are rotated.
    """
    tensors, decoded = encoded(entry, codec, rope)[1], round_trip(entry, codec, rope)

    def error(states: tuple[Tensor, ...], lossy: tuple[Tensor, ...]) -> float:
        old, new = (torch.cat([t.flatten() for t in ts]).double() for ts in (states, lossy))
        return float((old - new).norm() / old.norm())

    return {
        "bytes_per_token": sum(t.nbytes for t in tensors.values()) / entry.num_tokens,
        "key_error": error(entry.keys, decoded.keys),
        "value_error": error(entry.values, decoded.values),
    }


def _lookups(folder: Path, count: int, timed: int = 2000) -> dict[str, float]:
    store = ChunkStore(config=StoreConfig(folder=folder, memory=0, disk=1 << 50))
    draw = random.Random(0)
    made = ((f"{draw.getrandbits(256):064x}", n) for n in range(count))
    rows = (Row(key=key, size=1000, uses=1, created=n, used=n) for key, n in made)
    Ledger(folder / INDEX).fill(rows)
    kv = ChunkKV((torch.ones(1, 4, 8),), (torch.ones(1, 4, 8),), torch.arange(4), "ab" * 32)
    keys = [chunk_key(kv.fingerprint, [n]) for n in range(timed)]
    for key in keys[::2]:
        store.put(key, kv)
    found = [store.lookup(key, kv.token_ids, kv.fingerprint) for key in keys]
    seconds = [lookup.lookup_s + lookup.load_s for lookup in found]
    return _percentiles({"hit": seconds[::2], "miss": seconds[1::2]})


def _matches(tokens: int, length: int = 4096, timed: int = 500) -> dict[str, float]:
    draw, tree, model = random.Random(0), PrefixTree(1 << 40), "ab" * 32
    states = torch.zeros(1, 1, length, 1)
    layer = SimpleNamespace(keys=states, values=states)
    cache = SimpleNamespace(exact=True, num_columns=length, layers=[layer])
    prompts = [tuple(draw.randrange(32_000) for _ in range(length))]

    def prompt() -> tuple[int, ...]:
        shared = draw.choice(prompts)[: draw.randrange(length)]
        return shared + tuple(draw.randrange(32_000) for _ in range(length - len(shared)))

    while tokens > 0:
        tokens -= tree.insert(cut_exact(cache, 0, prompts[-1], model))
        prompts.append(prompt())
    seconds = []
    for token_ids in [prompt() for _ in range(timed)]:
        started = time.perf_counter()
        with tree.match(model, token_ids):
            seconds.append(time.perf_counter() - started)
    return _percentiles({"match": seconds})


def _percentiles(times: Mapping[str, list[float]]) -> dict[str, float]:
    pairs = product(times.items(), (50, 99))
    return {f"{n}_p{p}_s": sorted(own)[len(own) * p // 100] for (n, own), p in pairs}


STORE = ReuseBench(width=512, intermediate=512, heads=8, kv_heads=8, layers=12, threads=1)
"""A narrow model with 49 kB per token: encoding is quick, but the chunks are large. One thread."""
QUICK = replace(STORE, tokens=300, chunk=64, question=16, layers=2, repeats=1, threads=1)
