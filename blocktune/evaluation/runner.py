"""Runs a suite: asks every method every question, saves each answer, writes ``results.json``."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from rich import progress as bars
from rich.console import Console
from rich.progress import Progress

from blocktune.evaluation.fidelity import measure_fidelity
from blocktune.evaluation.prepare import Load, Ready, load_engine, prepare
from blocktune.evaluation.results import RESULTS, build_results
from blocktune.evaluation.rows import ROWS, Row, RowFile, code_digest, make_row, row_key
from blocktune.evaluation.suite import MethodSpec, Suite
from blocktune.evaluation.ttft import CleanCaches, TtftSummary, measure_ttft
from blocktune.files import alone_in, replace_json
from blocktune.models.identity import digest_of
from blocktune.parsing import load_json
from blocktune.provenance import hardware, provenance, versions

PATIENCE = timedelta(days=7)  # longest time that one process waits for another


@dataclass(frozen=True)
class Processes:
    """The processes that share a run, as seen by one of them."""

    rank: int = 0  # index of this process, from 0
    count: int = 1  # number of processes
    device: str | None = None  # device of this process; None: the suite decides
    wait: Callable[[], None] = lambda: None  # barrier: returns once every process has called it

    @property
    def is_main(self) -> bool:
        """Whether this process merges the answers, measures times and writes the results."""
        return self.rank == 0

    def share(self, items: Sequence) -> Sequence:
        """This process's share of ``items``; every process must pass the same sequence."""
        return items[self.rank :: self.count]


def launched() -> Processes:
    """The processes that ``accelerate launch`` or ``torchrun`` started, or this one alone.

    There may be more processes than GPUs: a small model leaves most of a GPU idle.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes()
    import torch
    from accelerate import PartialState

    gpus = torch.cuda.device_count()
    crowded = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > gpus  # NCCL: one process per GPU
    state = PartialState(cpu=crowded, timeout=PATIENCE)
    atexit.register(state.destroy_process_group)
    device = f"cuda:{state.local_process_index % gpus}" if gpus else "cpu"
    # accelerate's barrier uses the GPU whose index is the local rank; a shared GPU has another.
    wait = torch.distributed.barrier if crowded else state.wait_for_everyone
    return Processes(state.process_index, state.num_processes, device, wait)


def run_suite(
    suite: Suite, output: str | Path, *, command: list[str] | None = None, load: Load = load_engine
) -> dict[str, Any] | None:
    """Answers, scores and times all questions of a suite. An interrupted run resumes.

    Writes ``rows/<label>.jsonl``, ``ttft.json`` and ``results.json`` to ``output``. Returns the
    content of ``results.json`` (see `build_results`), or None except in the main process. It names
    the ``command``, by default ``sys.argv``. Raises ValueError, before the first question, if
    something cannot be run, or ``output`` has answers to other questions, which would be lost.
    """
    processes = launched()
    if processes.device is not None:
        suite = replace(suite, device=processes.device)
    output, ready = Path(output), prepare(suite, load)
    (output / ROWS).mkdir(parents=True, exist_ok=True)
    shown = progress_bars(shown=processes.is_main)
    with alone_in(output, processes.is_main), shown as progress:
        weights = ready.fingerprints()  # computed now: an adapter may be retrained during the run
        files = {spec.label: _open(ready, spec, output, processes) for spec in suite.methods}
        processes.wait()  # no process writes before all have read
        _answer_all(ready, files, processes, progress)
        processes.wait()
        if not processes.is_main:
            return None
        rows = {label: file.merge() for label, file in files.items()}
        times, fidelity = {}, {}
        if ready.timed:
            measure = partial(measure_ttft, ready, progress.track)
            times = _measure_once(output / "ttft.json", suite, rows, measure)
        if suite.fidelity.num:
            measure = partial(measure_fidelity, ready, progress.track)
            fidelity = _measure_once(output / "fidelity.json", suite, rows, measure)
        ttft = {label: TtftSummary(*own) for label, own in times.items()}
        origin = provenance(suite.seed, command) | {"processes": processes.count} | weights
        results = build_results(suite, rows, ttft, origin, fidelity)
        replace_json(output / RESULTS, results)
    return results


def _open(ready: Ready, spec: MethodSpec, output: Path, processes: Processes) -> RowFile:
    engine = ready.engines[spec.adapter]
    method, codec = ready.methods[spec.label], engine.store.config.codec
    code = {t.name: code_digest(method, {t.metric, *t.metrics}) for t in ready.suite.tasks}
    if method.history is not None:  # what a prompt finds depends on the batches before it
        code = {name: f"{digest}-{ready.suite.batch_size}" for name, digest in code.items()}
    weights, asked = engine.fingerprint, ready.questions
    keys = [row_key(spec, task, own, weights, code[task.name], codec) for task, own in asked]
    file = RowFile(output / ROWS, spec.label, keys, processes.rank)
    file.refuse_loss(asked)
    return file


def _answer_all(
    ready: Ready, files: Mapping[str, RowFile], processes: Processes, progress: Progress
) -> None:
    """Lets all methods, by adapter, answer a batch before the next: they share encoded chunks."""
    specs = sorted(ready.suite.methods, key=lambda spec: list(ready.engines).index(spec.adapter))
    batches, first, size = [], 0, ready.suite.batch_size
    for task in ready.suite.tasks:
        stop = first + len(ready.of(task))
        batches += [range(start, min(start + size, stop)) for start in range(first, stop, size)]
        first = stop
    asked = ((b, [spec for spec in specs if files[spec.label].lacks(b)]) for b in batches)
    work, caches = processes.share([(batch, left) for batch, left in asked if left]), CleanCaches()
    bar = progress.add_task("", total=sum(len(batch) * len(left) for batch, left in work))
    for batch, left in work:
        task, examples = ready.questions[batch[0]][0], [ready.questions[i][1] for i in batch]
        how = {"max_new_tokens": task.max_new_tokens, "batch_size": len(examples)}
        for spec in left:
            progress.update(bar, description=spec.label)
            file, method = files[spec.label], ready.methods[spec.label]
            engine = ready.engine(spec, task)
            caches.prepare(engine, method, examples)
            answers = engine.answer(examples, method, **how)
            file.append(
                make_row(file.keys[i], task, example, answer, engine, method)
                for i, example, answer in zip(batch, examples, answers, strict=True)
            )
            progress.advance(bar, len(batch))


def _measure_once(
    path: Path, suite: Suite, rows: Mapping[str, Sequence[Row]], measure: Callable[[], Any]
) -> Any:
    """Reads the file of an earlier run with the same rows, machine and code, or measures again."""
    name, row_keys = path.stem, {label: [row.key for row in own] for label, own in rows.items()}
    keys = [path.name, getattr(suite, name), row_keys, code_digest(), hardware(), versions()]
    digest = digest_of([*keys, suite.device, str(suite.store)])
    record = load_json(path) if path.exists() else None
    if not isinstance(record, dict) or record.get("keys") != digest:
        record = {"keys": digest, name: measure()}
        replace_json(path, record)
    return record[name]


def progress_bars(console: Console | None = None, shown: bool = True) -> Progress:
    """Progress bars on standard error, or on ``console``; hidden unless ``shown``."""
    name = bars.TextColumn("{task.description}", markup=False)  # a label may have brackets
    done = (name, bars.BarColumn(), bars.MofNCompleteColumn())
    times = (bars.TimeElapsedColumn(), bars.TextColumn("left"), bars.TimeRemainingColumn())
    return Progress(*done, *times, console=console or Console(stderr=True), disable=not shown)
