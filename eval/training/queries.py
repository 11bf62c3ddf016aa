"""The two evaluation suites: dev worlds to choose a recipe, and test worlds to evaluate it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from runs import Run

from blocktune.adapter import AdapterInfo
from blocktune.evaluation.rows import Row, read_all
from blocktune.evaluation.suite import load_suite
from blocktune.hub.card import served_by

FULL, NAIVE, BLEND = "full-prefill", "naive", "cacheblend"
JOINED, ALONE = "joined", "self-contained"
"""The tasks: questions that need several chunks (cross-chunk, 2-hop), or only one chunk."""
BATCH = 16
SEEDS = {"dev": 1, "test": 11}
"""Seeds of the worlds. Nothing else in the project, not even the demo, uses the test questions."""


def method_of(run: Run) -> str:
    """The method that serves an adapter as it was trained, with nothing recomputed."""
    return served_by(AdapterInfo.load(run.folder).layout)


def in_full(name: str) -> str:
    """Label of the adapter ``name`` in full attention."""
    return f"{name} in full"


def suite_of(
    model: str,
    runs: Sequence[Run],
    split: str,
    joined: int,
    alone: int,
    whole: bool,
    worlds: str = "",
) -> dict[str, Any]:
    """Builds a suite, as it is written to YAML.

    Args:
        model: Path or Hub name of the base model.
        runs: Finished training runs; the seeds of a recipe are pooled.
        split: Split of the worlds, ``dev`` or ``test``.
        joined: Number of questions that need several chunks.
        alone: Number of self-contained questions; may be 0.
        whole: Whether to add the baselines and every adapter in full attention.
        worlds: Further options of the worlds, e.g. ``crowded=1``.
    """
    methods: list[Any] = [FULL]
    if whole:
        methods += [NAIVE, {"name": BLEND, "params": {"ratio": 0.15}}]
    for name in dict.fromkeys(run.name for run in runs):
        own = [run for run in runs if run.name == name]
        method, seeds = method_of(own[0]), [run.seed for run in own]
        adapter = str(own[0].output / f"{name}-{{seed}}")
        entry = {"name": method, "label": name, "adapter": adapter, "seeds": seeds}
        if method != FULL or whole:
            methods.append(entry)
        if whole and method != FULL:
            methods.append(entry | {"name": FULL, "label": in_full(name)})
    source, more = f"worlds:{split}?seed={SEEDS[split]}", f"&{worlds}" if worlds else ""
    tasks = [_task(JOINED, f"{source}&n={joined}&kinds=cross-chunk,2-hop{more}")]
    if alone:
        tasks.append(_task(ALONE, f"{source}&n={alone}&kinds=self-contained{more}"))
    return {
        "model": model,
        "dtype": "float32",
        "batch_size": BATCH,
        "methods": methods,
        "tasks": tasks,
        "ttft": {"num": 0},
    }


def ask(suite: dict[str, Any], output: Path, jobs: int) -> dict[str, list[Row]]:
    """Runs a suite in ``jobs`` processes, resuming an interrupted run; returns rows by label.

    Raises:
        ValueError: If the evaluation fails; its own output says why.
    """
    output.mkdir(parents=True, exist_ok=True)
    path = output / "suite.yaml"
    path.write_text(yaml.safe_dump(suite, sort_keys=False), encoding="utf-8")
    start = [sys.executable, "-m"]
    if jobs > 1:
        start += ["torch.distributed.run", "--standalone", "--nproc_per_node", str(jobs), "-m"]
    command = [*start, "blocktune.cli", "eval", "--suite", str(path), "--output", str(output)]
    if subprocess.run(command, check=False).returncode:
        raise ValueError(f"the evaluation of {path} failed; see above")
    return read_all(output, [spec.label for spec in load_suite(path).methods])


def _task(name: str, source: str) -> dict[str, Any]:
    return {"name": name, "source": source, "answer_marker": "Answer:", "max_new_tokens": 32}
