"""Chooses a method's parameters on held-out questions: every point of a grid, the best one kept."""

from __future__ import annotations

import multiprocessing
from collections.abc import Mapping
from pathlib import Path
from threading import BrokenBarrierError
from typing import Any

from blocktune.evaluation.files import replace_json
from blocktune.evaluation.grid import TuneSpec
from blocktune.evaluation.prepare import Load, load_engine
from blocktune.evaluation.processes import PATIENCE, Processes
from blocktune.evaluation.runner import run_suite
from blocktune.evaluation.suite import Suite

TUNED = "tuned.json"


def tune(
    spec: TuneSpec,
    output: str | Path,
    *,
    processes: int = 1,
    command: list[str] | None = None,
    load: Load = load_engine,
) -> dict[str, Any]:
    """Tries every point; a run that was stopped goes on where it was.

    Args:
        spec: What to try, on which questions.
        output: Folder for rows, ``results.json`` and ``tuned.json``.
        processes: Processes of this machine that share the questions.
        command: What the user typed, for the provenance.
        load: How weights are loaded; several processes always load them by `load_engine`.

    Returns:
        What ``tuned.json`` holds: ``best`` (values, entry, score with interval, cost), all
        ``points`` from best to worst, and the provenance. The best of several points is chosen by
        its score on these questions, so that score flatters it: measure it on others.

    Raises:
        ValueError: In one line and before the first question, if anything cannot be run.
    """
    suite, output = spec.suite(), Path(output)
    if processes == 1:
        results = run_suite(suite, output, command=command, load=load)
    else:
        results = _together(suite, output, processes, command)
    tuned = _ranked(spec, results)
    replace_json(output / TUNED, tuned)
    return tuned


def _ranked(spec: TuneSpec, results: Mapping[str, Any]) -> dict[str, Any]:
    """Points by score, the cheaper one first where two are equal."""
    kept = ("score", "score_ci95", "n", "recompute_ratio")
    points = [
        {"label": point.label, "values": point.values, "entry": point.entry}
        | {key: results["methods"][point.label][key] for key in kept}
        for point in spec.points()
    ]
    points.sort(key=lambda point: (-point["score"], point["recompute_ratio"]))
    task = {"name": spec.task.name, "source": spec.task.source, "metric": spec.task.metric}
    provenance = results["provenance"]
    return {"best": points[0], "points": points, "task": task, "provenance": provenance}


def _together(suite: Suite, output: Path, count: int, command: list[str] | None) -> dict[str, Any]:
    """Runs a suite in several processes; this one is the first, and reports."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(count)
    others = [
        context.Process(target=_share, args=(suite, output, rank, count, barrier), daemon=True)
        for rank in range(1, count)
    ]
    for other in others:
        other.start()
    try:
        mine = Processes(0, count, wait=_waiting(barrier))
        return run_suite(suite, output, command=command, processes=mine)
    except BrokenBarrierError:
        raise ValueError("a process of the tuner failed; its error stands above") from None
    finally:
        barrier.abort()
        for other in others:
            other.join()


def _share(suite: Suite, output: Path, rank: int, count: int, barrier: Any) -> None:
    try:
        run_suite(suite, output, processes=Processes(rank, count, wait=_waiting(barrier)))
    except BrokenBarrierError:
        return  # another one failed, or the main one needs nothing more
    except BaseException:
        barrier.abort()
        raise


def _waiting(barrier: Any):
    return lambda: barrier.wait(PATIENCE.total_seconds())
