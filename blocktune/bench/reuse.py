"""Time to the first logits of reuse methods, against a full prefill and what is the least to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from blocktune.attention.cached import CachePlan
from blocktune.bench.timing import (
    TARGETS,
    ReuseBench,
    Times,
    copy_rate,
    matmul_rate,
    ratios,
    spread,
    take_turns,
    threads,
)
from blocktune.engine import Engine, Sampling, Usage
from blocktune.engine.generation import Generation
from blocktune.engine.rows import computed_rows
from blocktune.layout import Kind
from blocktune.methods import Method
from blocktune.prompt import Pieces
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
        engine = bench.engine()
        pieces = bench.pieces(len(engine.tokenizer))
        methods = bench.methods()
        usages = {name: _usage(engine, pieces, method) for name, method in methods.items()}
        times = take_turns(_works(engine, pieces, methods), bench.repeats)
        rates = (copy_rate(), matmul_rate())
    times["full"] = [
        min(pair) for pair in zip(times["full_engine"], times["full_stock"], strict=True)
    ]
    return _report(bench, times, usages, rates)


def _works(
    engine: Engine, pieces: Pieces, methods: dict[str, Method]
) -> dict[str, Callable[[], object]]:
    def of(method: Method) -> Callable[[], object]:
        return lambda: engine.start([pieces], method)

    works = {name: of(method) for name, method in methods.items()}
    works["full_engine"] = works.pop("full")
    works["full_stock"] = _stock(engine, pieces)
    works["query_only"] = _query_only(engine, engine.start([pieces], methods["naive"]))
    return works


def _stock(engine: Engine, pieces: Pieces) -> Callable[[], object]:
    """The stock model with its own attention."""
    ids = torch.tensor([sum(pieces.chunks, ()) + pieces.query])

    def work() -> None:
        engine.model(ids, use_cache=True, logits_to_keep=1)

    return work


def _query_only(engine: Engine, run: Generation) -> Callable[[], object]:
    """Computes the question again over the cache of a run, writing over its own columns."""
    asked = run.batch.layout.kind == Kind.QUERY
    rows = computed_rows(run.batch, asked)

    def work() -> None:
        run.cache.select(rows.columns)
        engine.model(
            rows.ids,
            position_ids=rows.rows.position,
            plan=CachePlan(rows.rows, run.columns),
            past_key_values=run.cache,
            use_cache=True,
            logits_to_keep=1,
        )

    return work


def _usage(engine: Engine, pieces: Pieces, method: Method) -> Usage:
    """The usage of a method whose chunks are cached."""
    engine.start([pieces], "naive")
    return engine.start([pieces], method).answers(Sampling(), 1, (0,))[0].usage


def _report(
    bench: ReuseBench,
    times: Times,
    usages: dict[str, Usage],
    rates: tuple[float, float],
) -> dict[str, Any]:
    """The numbers as `bench_reuse` returns them; rates are bytes and operations per second."""
    copy, matmul = rates
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
