"""`blocktune bench`."""

from __future__ import annotations

import json

import typer

from blocktune.commands.options import AsJson, teach


def add_to(app: typer.Typer) -> None:
    """Registers the group."""
    group = typer.Typer(no_args_is_help=True, help="Measure speed on this machine.")
    group.command("attention", epilog=teach("blocktune bench attention --json"))(attention)
    app.add_typer(group, name="bench")


def attention(as_json: AsJson = False) -> None:
    """Time split attention, forward and backward, against full causal and dense-mask SDPA."""
    from blocktune.bench import bench_attention

    found = bench_attention()
    typer.echo(json.dumps(found, indent=2) if as_json else "\n".join(map(_line, found.items())))


def _line(item: tuple[str, object]) -> str:
    name, value = item
    return f"{name:>24}  {value:.3f}" if isinstance(value, float) else f"{name:>24}  {value}"
