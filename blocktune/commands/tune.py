"""`blocktune tune`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from blocktune.commands.errors import resumable
from blocktune.commands.options import AsJson, Limit, quiet_libraries, teach


def add_to(app: typer.Typer) -> None:
    """Registers the command."""
    app.command(
        "tune",
        epilog=teach(
            "blocktune tune --config eval/tuning/psr.yaml --output out/tuned",
            "blocktune tune --config eval/tuning/psr.yaml --output out/tuned --processes 2",
            "A stopped command continues where it stopped: repeat it.",
        ),
    )(tune)


def tune(
    config: Annotated[Path, typer.Option(help="YAML of the run; see eval/tuning/.")],
    output: Annotated[Path, typer.Option(help="Folder for rows and tuned.json.")],
    processes: Annotated[int, typer.Option(min=1, help="Processes that share the questions.")] = 1,
    limit: Limit = None,
    model: Annotated[str | None, typer.Option(help="Overrides the model of the file.")] = None,
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
    from blocktune.tables import Table

    with resumable(f"the rows so far are in {output}"):
        found = run(spec, output, processes=processes)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    names = list(found["best"]["values"])
    rows = []
    for point in found["points"]:
        low, high = (100 * bound for bound in point["score_ci95"])
        numbers = (f"{100 * point['score']:.1f}", f"{low:.1f} to {high:.1f}")
        values = map(str, point["values"].values())
        rows.append((*values, *numbers, f"{point['recompute_ratio']:.0%}"))
    headings = (*names, found["task"]["metric"], "95 %", "recomputed")
    Table(headings, rows, left=names).show()
    typer.echo(f"best: {found['best']['label']}; all points in {output / TUNED}")
