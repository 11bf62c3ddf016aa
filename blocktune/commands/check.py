"""`blocktune check`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from blocktune.commands.options import (
    Adapter,
    AsJson,
    Device,
    Dtype,
    Model,
    Quantize,
    load_engine,
    teach,
)


def add_to(app: typer.Typer) -> None:
    """Registers the command."""
    app.command(
        "check",
        epilog=teach(
            "blocktune check --model data/tiny",
            "blocktune check --method 'naive + first-k 8'   # the contract of one method",
            "blocktune check --method mine --plugin mine.py",
            "blocktune check --model meta-llama/Llama-3.1-8B-Instruct --dtype float32 --json",
            "The exit code is 0 if every check passed, else 1.",
        ),
    )(check)


def check(
    model: Model = None,
    adapter: Adapter = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="Check the contract of this method instead; without --model on a small random one."
        ),
    ] = None,
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Check that reuse is exact on your model: masks, relocation and caches against dense."""
    from blocktune.check import check_method, check_model
    from blocktune.methods import parse_method
    from blocktune.tables import Table

    built = None if method is None else parse_method(method)
    engine = None
    if built is None or model is not None or adapter is not None:
        engine = load_engine(model, adapter, None, dtype, device, quantize)
    checks = check_model(engine) if built is None else check_method(built, engine)
    sound = all(one.passed for one in checks)
    if as_json:
        typer.echo(json.dumps({"checks": [one.to_dict() for one in checks]}, indent=2))
    else:
        verdicts = {True: "[green]ok[/green]", False: "[red]FAILED[/red]"}
        rows = [
            (verdicts[one.passed], one.name, f"{one.max_abs_diff:.1e}", f"{one.tolerance:.1e}")
            for one in checks
        ]
        Table(("", "check", "difference", "tolerance"), rows, left=("check",)).show()
        where = "on this model" if built is None else f"by '{built.name}'"
        typer.echo(f"Reuse {where} is sound." if sound else f"Do not serve: reuse {where} fails.")
    raise typer.Exit(0 if sound else 1)
