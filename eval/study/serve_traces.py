"""Serves traces request by request: storage against accuracy against time.

python eval/study/serve_traces.py --trace eval/study/suites/traces.yaml --output out/traces
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

from page_figures import draw_trace
from rich.console import Console
from traces import Pattern, TraceSuite, load_traces, make_trace, reuse_of, summed_up

from blocktune.data import RagExample, load_examples
from blocktune.engine import Engine
from blocktune.evaluation.prepare import check_prompts, tell_rewording
from blocktune.evaluation.rows import code_digest, scores_of
from blocktune.evaluation.runner import progress_bars
from blocktune.evaluation.suite import MethodSpec
from blocktune.files import replace_json
from blocktune.methods import build_entry
from blocktune.models.identity import digest_of
from blocktune.provenance import hardware, provenance, versions
from blocktune.tables import Table, with_half, written

TRACES, CELLS = "traces.json", "cells"
UNBOUNDED_MIB = 1 << 20
"""Stands for as much memory as is needed: a TiB."""


class Server(NamedTuple):
    """What answers in one cell: an entry of the suite, its built method, its weights."""

    spec: MethodSpec
    method: Any
    engine: Any


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

    A stopped run resumes with the first unfinished cell; a cell is kept as long as weights, method,
    requests, code and machine are the same.

    Args:
        suite: What to run.
        output: Folder for ``traces.json``, its pictures and ``cells/``.
        console: Where progress is shown; standard error by default.
        load: How weights are loaded.

    Returns:
        What ``traces.json`` holds: ``{"traces": {PATTERN: {"reuse", "cells": [...]}}, ...}``; a
        cell is a method in one size of memory, see `summed_up`.

    Raises:
        ValueError: If a method, a question or a prompt cannot be run.
    """
    servers = _servers(suite, load)
    examples = _questions(suite, servers[0].engine.tokenizer)
    check_prompts({s.spec.adapter or "base": s.engine for s in servers}, examples[0])
    output, found = Path(output), {}
    with progress_bars(console) as progress:
        total = len(suite.patterns) * len(servers) * len(suite.store_mib) * suite.requests
        bar = progress.add_task("requests", total=total)
        step = partial(progress.advance, bar)
        for pattern in suite.patterns:
            trace = make_trace(examples, pattern, suite.requests, suite.seed)
            cells = list(_cells(suite, pattern, servers, trace, output / CELLS, step))
            found[pattern.name] = {
                "reuse": reuse_of(trace),
                "cells": summed_up(cells, suite.pool, suite.seed),
            }
    results = {"traces": found, "metric": suite.task.metric, "provenance": provenance(suite.seed)}
    replace_json(output / TRACES, results)
    for name, trace in found.items():
        draw_trace(trace["cells"], output / f"traces-{name}.png", name)
    return results


def _servers(suite: TraceSuite, load: Any) -> list[Server]:
    methods = {spec.label: build_entry(spec.entry()) for spec in suite.methods}
    engines = {adapter: load(suite, adapter) for adapter in {s.adapter: 0 for s in suite.methods}}
    worded = {
        adapter: engine.reworded(suite.task.worded(engine.format))
        for adapter, engine in engines.items()
    }
    tell_rewording(engines, {(adapter, suite.task.name): e for adapter, e in worded.items()})
    return [Server(spec, methods[spec.label], worded[spec.adapter]) for spec in suite.methods]


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


def _cells(
    suite: TraceSuite,
    pattern: Pattern,
    servers: Sequence[Server],
    trace: Sequence[RagExample],
    folder: Path,
    step: Callable[..., None],
) -> Iterator[dict[str, Any]]:
    """The cells of one trace: those that are on disk, and the others, which are served now."""
    asked = [asdict(pattern), suite.warmup, [request.to_json() for request in trace]]
    for server, mib in product(servers, suite.store_mib):
        spec, weights = server.spec, server.engine.fingerprint
        parts = [asked, suite.task.decides(), spec.entry(), weights, mib, code_digest()]
        key = digest_of([*parts, hardware(), versions()])
        path = folder / f"{pattern.name}-{spec.label}-{mib}.json"
        cell = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if cell.get("key") == key:
            step(len(trace))
        else:
            cell = {"key": key} | _served(suite, server, trace, mib, step)
            replace_json(path, cell)
        yield cell


def _served(
    suite: TraceSuite,
    server: Server,
    trace: Sequence[RagExample],
    mib: int,
    step: Callable[..., None],
) -> dict[str, Any]:
    """One method over one trace in one size of memory; ``scores`` has a mean for each question."""
    spec, method, engine = server
    engine.forget()
    engine.store.max_bytes = (mib or UNBOUNDED_MIB) << 20
    scores, usages = defaultdict(list), []
    for number, request in enumerate(trace):
        [answer] = engine.answer(
            [request], method, max_new_tokens=suite.task.max_new_tokens, batch_size=1
        )
        step()
        if number >= suite.warmup:
            scored = scores_of(suite.task, answer.text, request, engine.tokenizer)
            scores[request.id].append(scored[suite.task.metric])
            usages.append(answer.usage)
    return {
        "method": spec.label,
        "adapter": spec.adapter,
        "store_mib": mib,
        "scores": [fmean(own) for own in scores.values()],
        "n": len(usages),
        **_spent(usages),
        "stored_bytes": engine.store.stats().memory_bytes,
    }


def _spent(usages: Sequence[Any]) -> Mapping[str, float | None]:
    held = sum(usage.chunk_hits + usage.chunk_misses for usage in usages)
    return {
        "hit_rate": sum(usage.chunk_hits for usage in usages) / held if held else None,
        "recompute_ratio": fmean(usage.recompute_ratio for usage in usages),
        "ttft_s": median(usage.ttft_s for usage in usages),
    }


def traces_table(results: Mapping[str, Any]) -> Table:
    """The cells of all traces for a terminal."""
    note = (
        "Score in % with half its 95 % interval. Stored: bytes of chunk states in memory at the "
        "end. TTFT: median, with the encoding of chunks that were not cached."
    )
    costs = ("memory\nMiB", "score", "stored\nMiB", "hits", "recom-\nputed", "TTFT\nms")
    rows = [
        (
            f"{name}: {cell['method']}",
            str(cell["store_mib"] or "any"),
            with_half(cell["score"], cell["ci95"]),
            f"{cell['stored_bytes'] / (1 << 20):.1f}",
            written("share", cell["hit_rate"]),
            written("share", cell["recompute_ratio"]),
            written("ms", cell["ttft_s"]),
        )
        for name, trace in results["traces"].items()
        for cell in trace["cells"]
    ]
    return Table(("trace: method", *costs), rows, note=note)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--trace", type=Path, required=True, help="YAML, see eval/study/suites/")
    parser.add_argument("--output", type=Path, required=True, help="traces.json and its pictures")
    parser.add_argument("--model", help="instead of the file's model")
    parser.add_argument("--requests", type=int, help="only the first requests")
    parser.add_argument("--dtype", help="of weights and caches, instead of the file's")
    parser.add_argument("--device", help="instead of the file's device")
    given = vars(parser.parse_args(arguments))
    suite, output = load_traces(given.pop("trace")), given.pop("output")
    suite = replace(suite, **{name: value for name, value in given.items() if value is not None})
    traces_table(run_traces(suite, output)).show()


if __name__ == "__main__":
    main()
