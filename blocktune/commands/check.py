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
        typer.Option(help="Check what every method must keep of this one; no model: a small one."),
    ] = None,
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Check on your own model that reuse is sound: masks, relocation, caches, all against dense."""
    from blocktune.check import check_method, check_model
    from blocktune.methods import parse_method

    built = None if method is None else parse_method(method)
    engine = None
    if built is None or model is not None or adapter is not None:
        engine = load_engine(model, adapter, None, dtype, device, quantize)
    checks = check_model(engine) if built is None else check_method(built, engine)
    if as_json:
        typer.echo(json.dumps({"checks": [one.to_dict() for one in checks]}, indent=2))
    else:
        _print_table(checks, "on this model" if built is None else f"by '{built.name}'")
    raise typer.Exit(0 if all(one.passed for one in checks) else 1)


def _print_table(checks: list, where: str) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("", "check", "difference", "tolerance"):
        table.add_column(heading, justify="left" if heading in ("", "check") else "right")
    for one in checks:
        verdict = "[green]ok[/green]" if one.passed else "[red]FAILED[/red]"
        table.add_row(verdict, one.name, f"{one.max_abs_diff:.1e}", f"{one.tolerance:.1e}")
    console = Console()
    console.print(table)
    sound = all(one.passed for one in checks)
    console.print(f"Reuse {where} is sound." if sound else f"Do not serve: reuse {where} is wrong.")
