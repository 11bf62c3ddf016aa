"""What overlap saves: chunks read from a cold folder before the prefill or during it."""

from __future__ import annotations

import os
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from blocktune.bench.timing import (
    LOADING,
    ReuseBench,
    ratios,
    spread,
    take_turns,
    threads,
    usage_of,
)
from blocktune.cache import ChunkStore
from blocktune.methods import compose
from blocktune.provenance import provenance

METHODS = {"serial": "cacheblend", "overlapped": "cacheblend-pipelined"}
"""They compute the same rows; the second loads a layer while it computes the one before."""


def bench_loading(bench: ReuseBench | None = None, folder: Path | None = None) -> dict[str, Any]:
    """Times CacheBlend over chunks in a folder that is not in the page cache.

    Before each prefill every file is dropped from the page cache, so that it is read from disk (on
    Linux; other systems may not allow it). Both methods recompute the same share of layer-tokens.

    Args:
        bench: The setting; `LOADING` if None.
        folder: Where the chunks are written, on the disk to measure; None: a temporary folder.

    Returns:
        ``overlapped_over_serial``, and ``bound_over_serial`` for perfect overlap, the longer of
        loading and the rest: medians of the ratios within each round, their ``spread``, ``seconds``
        likewise; the bytes that a prompt reads; the setting and the provenance.
    """
    bench = bench or LOADING
    share = 1 / bench.layers + bench.ratio * (1 - 1 / bench.layers)
    methods = {name: compose(m, layer_budget=share) for name, m in METHODS.items()}
    loads: dict[str, list[float]] = {name: [] for name in methods}
    with TemporaryDirectory(dir=folder) as temporary, threads(bench.threads), torch.no_grad():
        engine = bench.engine(ChunkStore(max_bytes=0, folder=Path(temporary)))
        pieces = bench.pieces(len(engine.tokenizer))
        engine.start([pieces], "naive")

        def cold_prefill(name: str) -> float:
            drop_cached(Path(temporary))
            started = time.perf_counter()
            run = engine.start([pieces], methods[name])
            seconds = time.perf_counter() - started
            loads[name].append(run.watch.seconds["load_s"])
            return seconds

        times = take_turns({name: partial(cold_prefill, name) for name in methods}, bench.repeats)
        read = usage_of(engine, pieces, methods["serial"]).bytes_read
    times["serial_load"] = loads["serial"][1:]  # the first round warms up
    pairs = zip(times["serial_load"], times["serial"], strict=True)
    times["bound"] = [max(load, whole - load) for load, whole in pairs]
    names = "overlapped_over_serial", "bound_over_serial"
    found = {name: spread(ratios(times, *name.split("_over_"))) for name in names}
    return {
        **{name: over["median"] for name, over in found.items()},
        "spread": found,
        "seconds": {name: spread(values) for name, values in times.items()},
        "bytes_read": read,
        "setting": {**asdict(bench), "layer_budget": share, "dtype": "float32"},
        **provenance(bench.seed),
    }


def drop_cached(folder: Path) -> None:
    """Drops the files of a folder from the page cache."""
    for path in filter(Path.is_file, folder.rglob("*")):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
