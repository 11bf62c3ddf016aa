"""`blocktune eval`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from blocktune.commands.options import quiet_libraries, teach


def add_to(app: typer.Typer) -> None:
    """Registers the command."""
    app.command(
        "eval",
        epilog=teach(
            "blocktune eval --suite eval/suites/quick.yaml --output out/quick",
            "blocktune eval --suite eval/suites/quick.yaml --output out/try --limit 20",
            "A run that was stopped goes on where it was: repeat the command.",
        ),
    )(evaluate)


def evaluate(
    suite: Annotated[Path, typer.Option(help="YAML of what to run; see eval/suites/.")],
    output: Annotated[Path, typer.Option(help="Folder for rows, results.json and the picture.")],
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only the first questions of each task.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Instead of the suite's model.")] = None,
    device: Annotated[str | None, typer.Option(help="Instead of the suite's device.")] = None,
) -> None:
    """Compare methods on the same questions: accuracy with intervals, cost, time to first token."""
    from blocktune.evaluation.suite import load_suite

    loaded = load_suite(suite)
    if limit:
        loaded = replace(loaded, tasks=tuple(replace(task, limit=limit) for task in loaded.tasks))
    loaded = replace(loaded, model=model or loaded.model, device=device or loaded.device)
    run_and_show(loaded, output, title=suite.stem)


def run_and_show(suite, output: Path, title: str, command: list[str] | None = None) -> dict:
    """Runs a suite, prints its table and draws its picture; returns the results.

    Args:
        suite: A `Suite`.
        output: Folder for all of it.
        title: Above the table.
        command: What the user typed, for the provenance; by default ``sys.argv``.
    """
    from rich.console import Console

    from blocktune.evaluation.figures import draw_results
    from blocktune.evaluation.runner import RESULTS, run_suite
    from blocktune.evaluation.table import results_table

    quiet_libraries()
    results = run_suite(suite, output, command=command)
    picture = draw_results(results, output / "results.png", _caption(results, suite.model))
    console = Console()
    if not console.is_terminal:
        console = Console(width=100)  # what the table is made for, in a file or a pipe
    console.print(results_table(results, title))
    console.print(f"[dim]{output / RESULTS}  {picture}  {output / 'rows'}/[/dim]")
    return results


def _caption(results: dict, model: str) -> str:
    count = max(summary["n"] for summary in results["methods"].values())
    return f"{Path(model).name}, {count:,} questions; bars are 95 % intervals"
