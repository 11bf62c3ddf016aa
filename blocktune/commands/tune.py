"""`blocktune tune`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from blocktune.commands.options import AsJson, quiet_libraries, teach


def add_to(app: typer.Typer) -> None:
    """Registers the command."""
    app.command(
        "tune",
        epilog=teach(
            "blocktune tune --config eval/tuning/psr.yaml --output out/tuned",
            "blocktune tune --config eval/tuning/psr.yaml --output out/tuned --processes 2",
            "A run that was stopped goes on where it was: repeat the command.",
        ),
    )(tune)


def tune(
    config: Annotated[Path, typer.Option(help="YAML of the run; see eval/tuning/.")],
    output: Annotated[Path, typer.Option(help="Folder for rows and tuned.json.")],
    processes: Annotated[int, typer.Option(min=1, help="Processes that share the questions.")] = 1,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first questions.")] = None,
    model: Annotated[str | None, typer.Option(help="Instead of the file's model.")] = None,
    as_json: AsJson = False,
) -> None:
    """Choose a method's parameters on held-out questions; a test split is refused."""
    from blocktune.evaluation.sweep import load_tuning

    spec = load_tuning(config)
    spec = replace(spec, model=model or spec.model)
    if limit:
        spec = replace(spec, task=replace(spec.task, limit=limit))
    quiet_libraries()
    from blocktune.evaluation.sweep import TUNED
    from blocktune.evaluation.sweep import tune as run

    found = run(spec, output, processes=processes)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        _print_points(found)
        typer.echo(f"best: {found['best']['label']}; all points in {output / TUNED}")


def _print_points(found: dict) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in found["best"]["values"]:
        table.add_column(name, overflow="fold")
    for heading in (found["task"]["metric"], "95 %", "fresh"):
        table.add_column(heading, justify="right", no_wrap=True)
    for point in found["points"]:
        low, high = point["score_ci95"]
        scores = (f"{100 * point['score']:.1f}", f"{100 * low:.1f} to {100 * high:.1f}")
        fresh = f"{point['recompute_ratio']:.0%}"
        table.add_row(*map(str, point["values"].values()), *scores, fresh)
    Console().print(table)
