"""Serves traces request by request, and sums up what they took: storage, accuracy, time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from blocktune.data import RagExample, load_examples
from blocktune.engine import Engine
from blocktune.evaluation.files import replace_json
from blocktune.evaluation.progress import progress_bars
from blocktune.evaluation.report.style import Ground, as_share, legend_below, mark, to_png
from blocktune.evaluation.rows import scores_of
from blocktune.evaluation.sanity import check_prompts
from blocktune.evaluation.statistics import PairedBootstrap
from blocktune.evaluation.suite import MethodSpec
from blocktune.evaluation.traces import TraceSuite, make_trace, reuse_of
from blocktune.provenance import provenance
from blocktune.reuse import build_entry

TRACES = "traces.json"
UNBOUNDED_MIB = 1 << 20
"""Stands for as much memory as is needed: a TiB."""


def load_engine(suite: TraceSuite, adapter: str | None) -> Engine:
    """The base model of a trace suite, with one of its adapters or none."""
    return Engine.from_pretrained(suite.model, adapter, dtype=suite.dtype, device=suite.device)


def run_traces(
    suite: TraceSuite,
    output: str | Path,
    *,
    console: Console | None = None,
    load: Any = load_engine,
) -> dict[str, Any]:
    """Serves every trace by every method in every size of memory, each from empty caches.

    Args:
        suite: What to run.
        output: Folder for ``traces.json`` and ``traces.png``.
        console: Where progress is shown; standard error by default.
        load: How weights are loaded.

    Returns:
        What ``traces.json`` holds: ``{"traces": {PATTERN: {"reuse", "cells": [...]}}, ...}``; a
        cell is a method in one size of memory.

    Raises:
        ValueError: If a method, a question or a prompt cannot be run.
    """
    methods = {spec.label: build_entry(spec.entry()) for spec in suite.methods}
    engines = {adapter: load(suite, adapter) for adapter in {s.adapter: 0 for s in suite.methods}}
    words = suite.task.format()
    if words is not None:
        engines = {adapter: engine.reworded(words) for adapter, engine in engines.items()}
    examples = _questions(suite, next(iter(engines.values())).tokenizer)
    check_prompts({name or "base": engine for name, engine in engines.items()}, examples[0])
    found = {}
    with progress_bars(console) as progress:
        total = len(suite.patterns) * len(suite.methods) * len(suite.store_mib) * suite.requests
        bar = progress.add_task("requests", total=total)
        step = partial(progress.advance, bar)
        for pattern in suite.patterns:
            trace = make_trace(examples, pattern, suite.requests, suite.seed)
            cells = [
                _served(suite, spec, methods[spec.label], engines[spec.adapter], trace, mib, step)
                for spec in suite.methods
                for mib in suite.store_mib
            ]
            found[pattern.name] = {"reuse": reuse_of(trace), "cells": cells}
    results = {"traces": found, "metric": suite.task.metric, "provenance": provenance(suite.seed)}
    replace_json(Path(output) / TRACES, results)
    for name, trace in found.items():
        draw_trace(trace["cells"], Path(output) / f"traces-{name}.png", name)
    return results


def _questions(suite: TraceSuite, tokenizer: Any) -> list[RagExample]:
    source = suite.task.full_source()
    examples = load_examples(source, limit=suite.questions, tokenizer=tokenizer)
    for index, example in enumerate(examples):
        if not example.answers or not example.supporting:
            raise ValueError(
                f"{source}: question {index + 1} lacks answers or supporting chunks; a trace must "
                "know which chunks hold the evidence"
            )
    return examples


def _served(
    suite: TraceSuite,
    spec: MethodSpec,
    method: Any,
    engine: Any,
    trace: Sequence[RagExample],
    mib: int,
    step: Any,
) -> dict[str, Any]:
    """One method over one trace in one size of memory."""
    engine.forget()
    engine.store.max_bytes = (mib or UNBOUNDED_MIB) << 20
    scores, accounts = [], []
    for number, request in enumerate(trace):
        [answer] = engine.answer(
            [request], method, max_new_tokens=suite.task.max_new_tokens, batch_size=1
        )
        step()
        if number >= suite.warmup:
            scored = scores_of(suite.task, answer.text, request, engine.tokenizer)
            scores.append(scored[suite.task.metric])
            accounts.append(answer.account)
    mean, low, high = PairedBootstrap({0: scores}, seed=suite.seed).mean(0)
    held = sum(account.chunk_hits + account.chunk_misses for account in accounts)
    return {
        "method": spec.label,
        "adapter": spec.adapter,
        "store_mib": mib,
        "score": mean,
        "ci95": [low, high],
        "n": len(scores),
        "stored_bytes": engine.store.stats().memory_bytes,
        "hit_rate": sum(account.chunk_hits for account in accounts) / held if held else None,
        "recompute_ratio": fmean(account.recompute_ratio for account in accounts),
        "ttft_s": median(account.ttft_s for account in accounts),
    }


def traces_table(results: Mapping[str, Any]) -> Table:
    """The cells of all traces for a terminal."""
    note = (
        "Score in % with half its 95 % interval. Stored: bytes of chunk states in memory at the "
        "end. TTFT: median, with the encoding of chunks that were not cached."
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption=note)
    for heading in ("trace", "method"):
        table.add_column(heading, no_wrap=True)
    for heading in ("memory\nMiB", "score", "stored\nMiB", "hits", "fresh", "TTFT\nms"):
        table.add_column(heading, justify="right")
    for name, trace in results["traces"].items():
        for cell in trace["cells"]:
            table.add_row(name, cell["method"], *_cells(cell))
    return table


def _cells(cell: Mapping[str, Any]) -> tuple[str, ...]:
    low, high = cell["ci95"]
    return (
        str(cell["store_mib"] or "any"),
        f"{100 * cell['score']:.1f} ±{50 * (high - low):.0f}",
        f"{cell['stored_bytes'] / (1 << 20):.1f}",
        "-" if cell["hit_rate"] is None else f"{cell['hit_rate']:.0%}",
        f"{cell['recompute_ratio']:.0%}",
        f"{1000 * cell['ttft_s']:.1f}",
    )


def draw_trace(cells: Sequence[Mapping[str, Any]], path: Path, title: str) -> Path:
    """Score against bytes stored; a larger point waits longer for its first token."""
    slowest = max(cell["ttft_s"] for cell in cells)
    labels = list(dict.fromkeys(cell["method"] for cell in cells))

    def draw(figure: Figure, ground: Ground) -> None:
        axes = figure.subplots()
        for index, label in enumerate(labels):
            own = [cell for cell in cells if cell["method"] == label]
            style = mark(ground, index)
            places = [cell["stored_bytes"] / (1 << 20) for cell in own]
            heights = [cell["score"] for cell in own]
            sizes = [20 + 130 * cell["ttft_s"] / slowest for cell in own]
            axes.plot(places, heights, color=style["color"], linewidth=1, zorder=1)
            axes.scatter(places, heights, s=sizes, label=label, zorder=2, clip_on=False, **style)
        axes.set_xlabel("MiB stored")
        axes.set_ylabel("score")
        as_share(axes.yaxis)
        axes.set_title(f"{title} (larger: slower first token)")
        legend_below(figure, axes)

    return to_png(draw, path, 3.2 + 0.19 * -(-len(labels) // 2))
