"""`blocktune methods`."""

from __future__ import annotations

import json

import typer

from blocktune.commands.options import AsJson, teach


def add_to(app: typer.Typer) -> None:
    """Registers the command."""
    app.command(
        "methods", epilog=teach("blocktune methods", "blocktune methods --json | jq '.[].name'")
    )(methods)


def methods(as_json: AsJson = False) -> None:
    """List the methods of reuse: what they do, need and take."""
    from blocktune.reuse import available, describe

    found = [describe(name) for name in available()]
    if as_json:
        typer.echo(json.dumps([entry._asdict() for entry in found], indent=2))
        return
    _print_table(found)


def _print_table(found: list) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("method", no_wrap=True, style="bold")
    table.add_column("what it does", overflow="fold")
    table.add_column("weights")
    table.add_column("parameters")
    for entry in found:
        parameters = "\n".join(f"{name}: {value}" for name, value in entry.parameters.items())
        summary = f"{entry.summary}\n[dim]{entry.source}[/dim]"
        table.add_row(entry.name, summary, entry.weights, parameters)
    Console().print(table)
