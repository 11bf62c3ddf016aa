"""`blocktune bench`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from blocktune.commands.options import AsJson, teach


def add_to(app: typer.Typer) -> None:
    """Registers the group."""
    group = typer.Typer(no_args_is_help=True, help="Measure speed on this machine.")
    group.command("attention", epilog=teach("blocktune bench attention --json"))(attention)
    app.add_typer(group, name="bench")


def attention(
    tokens: Annotated[int, typer.Option(min=2, help="Length of the prompt.")] = 8192,
    chunk: Annotated[int, typer.Option(min=1, help="Tokens per chunk.")] = 512,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; medians are shown.")] = 5,
    as_json: AsJson = False,
) -> None:
    """Time split attention, forward and backward, against full causal and dense-mask SDPA."""
    from blocktune.bench import bench_attention

    found = bench_attention(tokens, chunk, repeats=repeats)
    typer.echo(json.dumps(found, indent=2) if as_json else "\n".join(map(_line, found.items())))


def _line(item: tuple[str, object]) -> str:
    name, value = item
    return f"{name:>24}  {value:.3f}" if isinstance(value, float) else f"{name:>24}  {value}"
