"""Runs a suite and shows what came out: table, sentences, picture, report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from blocktune.evaluation.figures import draw_results
from blocktune.evaluation.findings import power_notes
from blocktune.evaluation.processes import Processes, launched
from blocktune.evaluation.runner import RESULTS, run_suite
from blocktune.evaluation.suite import Suite
from blocktune.evaluation.table import results_table


def run_and_show(
    suite: Suite,
    output: Path,
    title: str,
    command: list[str] | None = None,
    processes: Processes | None = None,
) -> dict[str, Any] | None:
    """Runs a suite, prints its table and draws its picture; returns the results.

    Args:
        suite: What to run.
        output: Folder for all of it.
        title: Above the table.
        command: What the user typed, for the provenance; by default ``sys.argv``.
        processes: Those that share the run; by default the ones that a launcher started.

    Returns:
        The results; None in all processes but the main one.
    """
    processes = processes or launched()
    suite = processes.placed(suite)
    results = run_suite(suite, output, command=command, processes=processes)
    if results is None:
        return None
    picture = draw_results(results, output / "results.png", _caption(results, suite.model))
    console = Console()
    if not console.is_terminal:
        console = Console(width=100)  # what the table is made for, in a file or a pipe
    console.print(results_table(results, title))
    for note in power_notes(results):
        console.print(f"[dim]{note}[/dim]", highlight=False)
    console.print(f"[dim]{output / RESULTS}  {picture}  {output / 'rows'}/[/dim]")
    return results


def _caption(results: dict[str, Any], model: str) -> str:
    count = max(summary["n"] for summary in results["methods"].values())
    return f"{Path(model).name}, {count:,} questions; bars are 95 % intervals"
