"""Runs a suite: every method on every question, row by row on disk, then ``results.json``."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from blocktune.cache import PrefixTree
from blocktune.data import RagExample, load_examples
from blocktune.engine import Engine
from blocktune.evaluation.files import replace_json
from blocktune.evaluation.provenance import provenance
from blocktune.evaluation.results import build_results
from blocktune.evaluation.rows import Row, RowFile, make_row, row_key
from blocktune.evaluation.sanity import check_prompts
from blocktune.evaluation.suite import MethodSpec, Suite, TaskSpec
from blocktune.evaluation.ttft import TtftSummary, measure_ttft
from blocktune.reuse import Method, build

RESULTS = "results.json"
TTFT = "ttft.json"
BASE = "base"


class Question(NamedTuple):
    """An example, the task it belongs to, and a name for it."""

    task: TaskSpec
    example: RagExample
    name: str


def run_suite(
    suite: Suite,
    output: str | Path,
    *,
    command: list[str] | None = None,
    console: Console | None = None,
    load: Callable[[Suite, str | None], Any] | None = None,
) -> dict[str, Any]:
    """Answers, times and scores; a run that was stopped goes on where it was.

    Everything that can be wrong is checked before the first question: methods, data, adapters,
    prompts. All weights stay loaded, since methods are timed in turn.

    Args:
        suite: What to run.
        output: Folder for ``rows/<label>.jsonl``, ``ttft.json`` and ``results.json``.
        command: What the user typed, for the provenance.
        console: Where progress is shown; standard error by default.
        load: ``(suite, adapter) -> engine``; `load_engine` by default.

    Returns:
        What ``results.json`` holds; see `build_results`.

    Raises:
        ValueError: In one line, if anything in the suite cannot be run.
    """
    output, console = Path(output), console or Console(stderr=True)
    methods = {spec.label: build(spec.name, **spec.params) for spec in suite.methods}
    questions = _questions(suite)
    engines = _load_all(suite, methods, load or load_engine)
    check_prompts(engines, questions[0].example)
    with _progress(console) as progress:
        rows = {
            spec.label: _answer_all(suite, spec, methods, engines, questions, output, progress)
            for spec in suite.methods
        }
        ttft = _times(suite, methods, engines, questions, rows, output, progress)
    results = build_results(suite, rows, ttft, provenance(suite.seed, command))
    replace_json(output / RESULTS, results)
    return results


def load_engine(suite: Suite, adapter: str | None) -> Engine:
    """The base model of a suite, with one of its adapters or none."""
    return Engine.from_pretrained(suite.model, adapter, dtype=suite.dtype, device=suite.device)


def _questions(suite: Suite) -> list[Question]:
    questions = []
    for task in suite.tasks:
        for index, example in enumerate(load_examples(task.source, limit=task.limit)):
            name = f"{task.name}/{index}"
            if not example.answers:
                raise ValueError(f"{task.source}: question {index + 1} has no answer to score with")
            questions.append(Question(task, example, name))
    if not questions:
        raise ValueError(f"no question in {', '.join(task.source for task in suite.tasks)}")
    return questions


def _load_all(
    suite: Suite, methods: Mapping[str, Method], load: Callable[[Suite, str | None], Any]
) -> dict[str, Any]:
    """Loads each set of weights once, and lets every method refuse weights it is not made for."""
    adapters = dict.fromkeys(spec.adapter for spec in suite.methods)
    engines = {adapter or BASE: load(suite, adapter) for adapter in adapters}
    for spec in suite.methods:
        adapter = engines[spec.adapter or BASE].adapter
        methods[spec.label].require(adapter.layout if adapter else None)
    return engines


def _answer_all(
    suite: Suite,
    spec: MethodSpec,
    methods: Mapping[str, Method],
    engines: Mapping[str, Any],
    questions: Sequence[Question],
    output: Path,
    progress: Progress,
) -> list[Row]:
    engine, method = engines[spec.adapter or BASE], methods[spec.label]
    keys = [row_key(spec, q.task, q.example, engine.fingerprint) for q in questions]
    file = RowFile(output / "rows" / f"{spec.label}.jsonl", keys)
    bar = progress.add_task(spec.label, total=len(questions))
    for batch in _batches(list(zip(keys, questions, strict=True)), suite.batch_size):
        if not all(key in file for key, _ in batch):
            task = batch[0][1].task
            answers = engine.answer(
                [q.example for _, q in batch],
                method,
                max_new_tokens=task.max_new_tokens,
                batch_size=suite.batch_size,
            )
            pairs = zip(batch, answers, strict=True)
            file.append(make_row(key, task, q.example, q.name, a) for (key, q), a in pairs)
        progress.advance(bar, len(batch))
    return file.rows()


def _batches(items: list[tuple[str, Question]], size: int):
    """Batches of one task; always the same ones, so that a resumed run repeats whole batches."""
    start = 0
    while start < len(items):
        task = items[start][1].task
        batch = [item for item in islice(items, start, start + size) if item[1].task is task]
        yield batch
        start += len(batch)


def _times(
    suite: Suite,
    methods: Mapping[str, Method],
    engines: Mapping[str, Any],
    questions: Sequence[Question],
    rows: Mapping[str, Sequence[Row]],
    output: Path,
    progress: Progress,
) -> dict[str, TtftSummary]:
    examples = [q.example for q in questions[: suite.ttft.num] if q.task is questions[0].task]
    if not examples:
        return {}
    keys = {label: [row.key for row in own[: len(examples)]] for label, own in rows.items()}
    path = output / TTFT
    if path.exists() and (known := json.loads(path.read_text(encoding="utf-8")))["keys"] == keys:
        return {label: TtftSummary(*times) for label, times in known["ttft"].items()}
    for engine in engines.values():
        engine.prefix_tree = PrefixTree()  # the answers above left these very prompts in it
    bar = progress.add_task("time to first token", total=2 * len(examples) * len(methods))

    def asking(spec: MethodSpec):
        engine, method = engines[spec.adapter or BASE], methods[spec.label]
        return lambda example: engine.answer([example], method, max_new_tokens=1, batch_size=1)[0]

    asks = {spec.label: asking(spec) for spec in suite.methods}
    ttft = measure_ttft(asks, examples, lambda: progress.advance(bar))
    replace_json(path, {"keys": keys, "ttft": ttft})
    return ttft


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
