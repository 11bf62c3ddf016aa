"""What overlap saves: chunks read from a cold folder before the prefill or during it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from blocktune.bench.timing import LOADING, ReuseBench, ratios, spread, take_turns, threads
from blocktune.cache import ChunkStore
from blocktune.engine import Engine, Sampling
from blocktune.methods import Method, compose
from blocktune.prompt import Pieces
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
    with (
        TemporaryDirectory(dir=folder) as temporary,
        threads(bench.threads),
        torch.no_grad(),
    ):
        store = ChunkStore(max_bytes=0, folder=Path(temporary))
        engine = bench.engine(store)
        pieces = bench.pieces(len(engine.tokenizer))
        engine.start([pieces], "naive")
        share = 1 / bench.layers + bench.ratio * (1 - 1 / bench.layers)
        methods = {name: compose(m, layer_budget=share) for name, m in METHODS.items()}
        loads: list[float] = []
        works = {
            name: _work(engine, pieces, method, Path(temporary), loads if name == "serial" else [])
            for name, method in methods.items()
        }
        times = take_turns(works, bench.repeats)
        read = _bytes_read(engine, pieces, methods["serial"])
    loads = loads[-bench.repeats :]  # the first round warms up
    times["serial_load"] = loads
    times["bound"] = [
        max(load, all_ - load) for load, all_ in zip(loads, times["serial"], strict=True)
    ]
    found = {name: ratios(times, *name.split("_over_")) for name in RATIOS}
    return {
        **{name: spread(values)["median"] for name, values in found.items()},
        "spread": {name: spread(values) for name, values in found.items()},
        "seconds": {name: spread(values) for name, values in times.items()},
        "bytes_read": read,
        "setting": {**asdict(bench), "layer_budget": share, "dtype": "float32"},
        **provenance(bench.seed),
    }


RATIOS = ("overlapped_over_serial", "bound_over_serial")


def _work(
    engine: Engine, pieces: Pieces, method: Method, folder: Path, loads: list[float]
) -> Callable[[], float]:
    """A cold prefill: returns its seconds, and appends those of loading to ``loads``."""

    def work() -> float:
        drop_cached(folder)
        started = time.perf_counter()
        run = engine.start([pieces], method)
        seconds = time.perf_counter() - started
        loads.append(run.watch.seconds["load_s"])
        return seconds

    return work


def drop_cached(folder: Path) -> None:
    """Drops the files of a folder from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


def _bytes_read(engine: Engine, pieces: Pieces, method: Method) -> int:
    return engine.start([pieces], method).answers(Sampling(), 1, (0,))[0].usage.bytes_read
