"""Time to the first logits of reuse methods, with chunks in memory and on a cold disk."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from blocktune.attention.cached import CachePlan
from blocktune.bench.timing import (
    LOADING,
    TARGETS,
    ReuseBench,
    copy_rate,
    matmul_rate,
    ratios,
    spread,
    take_turns,
    threads,
    usage_of,
)
from blocktune.cache import ChunkStore
from blocktune.engine import Usage
from blocktune.engine.generation import Generation
from blocktune.engine.rows import computed_rows
from blocktune.layout import Kind
from blocktune.methods import compose
from blocktune.provenance import provenance


def bench_reuse(bench: ReuseBench | None = None) -> dict[str, Any]:
    """Times prefills by several methods in turn, chunks encoded beforehand and kept in memory.

    A method's time covers everything from token pieces to the logits after the question: looking
    up chunks, moving their keys, joining caches, selecting, computing. ``full`` is the faster of
    this engine's and the stock model's full prefill in each round; ``query_only`` computes the
    question over an assembled cache.

    Returns:
        The ratios of `TARGETS` (medians of the ratios within each round), their ``spread`` over
        the rounds (median, least, greatest) and the targets; ``seconds`` of each, likewise; per
        method the bytes it moved, the operations it computed, and the seconds these take at the
        measured copy and matmul rates; the setting and the provenance.
    """
    bench = bench or ReuseBench()
    with threads(bench.threads), torch.no_grad():
        engine, methods = bench.engine(), bench.methods()
        pieces = bench.pieces(len(engine.tokenizer))
        run = engine.start([pieces], methods["naive"])
        usages = {name: usage_of(engine, pieces, method) for name, method in methods.items()}
        works = {name: partial(engine.start, [pieces], m) for name, m in methods.items()}
        works["full_engine"] = works.pop("full")
        ids = torch.tensor([sum(pieces.chunks, ()) + pieces.query])
        works["full_stock"] = partial(engine.model, ids, use_cache=True, logits_to_keep=1)
        works["query_only"] = query_only(engine.model, run)
        times = take_turns(works, bench.repeats)
        copy, matmul = copy_rate(bench.repeats), matmul_rate(bench.repeats)
    times["full"] = list(map(min, times["full_engine"], times["full_stock"]))
    found = {name: spread(ratios(times, *name.split("_over_"))) for name in TARGETS}
    return {
        **{name: over["median"] for name, over in found.items()},
        "spread": found,
        "targets": TARGETS,
        "seconds": {name: spread(values) for name, values in times.items()},
        "bytes_per_s_copied": copy,
        "flops_per_s_matmul": matmul,
        "cost": {name: _cost(usage, copy, matmul) for name, usage in usages.items()},
        "setting": {**asdict(bench), "dtype": "float32"},
        **provenance(bench.seed),
    }


def query_only(model: torch.nn.Module, run: Generation) -> Callable[[], object]:
    """Computes the question again over the cache of a run, writing over its own columns."""
    rows = computed_rows(run.batch, run.batch.layout.kind == Kind.QUERY)

    def work() -> object:
        run.cache.select(rows.columns)
        return model(
            rows.ids,
            position_ids=rows.rows.position,
            plan=CachePlan(rows.rows, run.columns),
            past_key_values=run.cache,
            use_cache=True,
            logits_to_keep=1,
        )

    return work


def _cost(usage: Usage, copy: float, matmul: float) -> dict[str, float]:
    """What a method moved and computed, and the least time for it on this machine."""
    return {
        "recompute_ratio": usage.recompute_ratio,
        "bytes_read": usage.bytes_read,
        "bytes_moved": usage.bytes_moved,
        "bytes_over_copy_rate_s": usage.bytes_moved / 2 / copy,  # read and written, see copy_rate
        "flops": usage.flops,
        "flops_over_matmul_rate_s": usage.flops / matmul,
    }


LOADED = {"serial": "cacheblend", "overlapped": "cacheblend-pipelined"}
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
    methods = {name: compose(m, layer_budget=share) for name, m in LOADED.items()}
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
