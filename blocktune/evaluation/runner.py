"""Runs a suite: every method on every question, row by row on disk, then ``results.json``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from blocktune.evaluation.files import replace_json
from blocktune.evaluation.prepare import Load, Question, Ready, load_engine, prepare
from blocktune.evaluation.provenance import provenance
from blocktune.evaluation.results import build_results
from blocktune.evaluation.rows import Row, RowFile, make_row, row_key
from blocktune.evaluation.suite import MethodSpec, Suite
from blocktune.evaluation.ttft import TtftSummary, measure_ttft

RESULTS = "results.json"
TTFT = "ttft.json"


def run_suite(
    suite: Suite,
    output: str | Path,
    *,
    command: list[str] | None = None,
    console: Console | None = None,
    load: Load = load_engine,
) -> dict[str, Any]:
    """Answers, times and scores; a run that was stopped goes on where it was.

    Args:
        suite: What to run.
        output: Folder for ``rows/<label>.jsonl``, ``ttft.json`` and ``results.json``.
        command: What the user typed, for the provenance.
        console: Where progress is shown; standard error by default.
        load: How weights are loaded.

    Returns:
        What ``results.json`` holds; see `build_results`.

    Raises:
        ValueError: In one line and before the first question, if anything cannot be run.
    """
    output, ready = Path(output), prepare(suite, load)
    with _progress(console or Console(stderr=True)) as progress:
        rows = {s.label: _answer_all(ready, s, output, progress) for s in suite.methods}
        ttft = _time_all(ready, rows, output, progress)
    results = build_results(suite, rows, ttft, provenance(suite.seed, command))
    replace_json(output / RESULTS, results)
    return results


def _answer_all(ready: Ready, spec: MethodSpec, output: Path, progress: Progress) -> list[Row]:
    fingerprint = ready.engines[spec.adapter].fingerprint
    keys = [row_key(spec, q.task, q.example, fingerprint) for q in ready.questions]
    file = RowFile(output / "rows" / f"{spec.label}.jsonl", keys)
    bar = progress.add_task(spec.label, total=len(keys))
    keyed = list(zip(keys, ready.questions, strict=True))
    for batch in _batches(keyed, ready.suite.batch_size):
        if not all(key in file for key, _ in batch):
            file.append(_answer_batch(ready, spec, batch))
        progress.advance(bar, len(batch))
    return file.rows()


def _answer_batch(
    ready: Ready, spec: MethodSpec, batch: Sequence[tuple[str, Question]]
) -> list[Row]:
    task, examples = batch[0][1].task, [question.example for _, question in batch]
    answers = ready.answer(
        spec, examples, max_new_tokens=task.max_new_tokens, batch_size=len(examples)
    )
    return [
        make_row(key, task, question.example, question.name, answer)
        for (key, question), answer in zip(batch, answers, strict=True)
    ]


def _batches(
    keyed: Sequence[tuple[str, Question]], size: int
) -> Iterator[list[tuple[str, Question]]]:
    """Batches of one task; always the same ones, so that a resumed run repeats whole batches."""
    start = 0
    while start < len(keyed):
        task = keyed[start][1].task
        batch = [item for item in islice(keyed, start, start + size) if item[1].task is task]
        yield batch
        start += len(batch)


def _time_all(
    ready: Ready, rows: Mapping[str, Sequence[Row]], output: Path, progress: Progress
) -> dict[str, TtftSummary]:
    if not ready.timed:
        return {}
    count, chunks = len(ready.timed), ready.suite.ttft.chunks
    keys = {label: [chunks, *(row.key for row in own[:count])] for label, own in rows.items()}
    path = output / TTFT
    if path.exists() and (known := json.loads(path.read_text(encoding="utf-8")))["keys"] == keys:
        return {label: TtftSummary(*times) for label, times in known["ttft"].items()}
    for engine in ready.engines.values():
        engine.forget_prefixes()  # the answers above left these very prompts there
    bar = progress.add_task("time to first token", total=2 * count * len(rows))
    methods = {spec.label: _asking(ready, spec) for spec in ready.suite.methods}
    ttft = measure_ttft(methods, ready.timed, lambda: progress.advance(bar))
    replace_json(path, {"keys": keys, "ttft": ttft})
    return ttft


def _asking(ready: Ready, spec: MethodSpec):
    return lambda example: ready.answer(spec, [example], max_new_tokens=1, batch_size=1)[0]


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )
