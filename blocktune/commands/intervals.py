"""`blocktune intervals`."""

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
        "intervals",
        epilog=teach(
            "blocktune intervals -m data/tiny -i 'worlds:validation?n=32'",
            "blocktune intervals -m M -i held_out.jsonl --limit 50 --most-layers 8 --json",
            "What it finds goes into the method:",
            "blocktune answer -m M -i q.jsonl --method 'droidspeak first_layer=9 ratio=0.125'",
        ),
    )(intervals)


def intervals(
    source: Annotated[
        str,
        typer.Option("--input", "-i", help="Held-out questions, JSONL or any data source."),
    ],
    model: Model = None,
    adapter: Adapter = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first questions.")] = None,
    most_layers: Annotated[int | None, typer.Option(min=1, help="Longest range tried.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions at a time.")] = 8,
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Find the layers that are worth computing for all chunks: the profile behind `droidspeak`."""
    from rich.console import Console
    from rich.progress import track

    from blocktune.commands.answering import read_examples
    from blocktune.engine.layer_profile import profile_layers

    examples = read_examples(source, limit, None, [])
    engine = load_engine(model, adapter, None, dtype, device, quantize)
    console = Console(stderr=True)
    found = profile_layers(
        engine,
        examples,
        most_layers=most_layers,
        batch_size=batch_size,
        progress=lambda ranges: iter(track(ranges, "profiling", console=console)),
    )
    if as_json:
        typer.echo(json.dumps([one.to_dict() for one in found], indent=2))
    else:
        _print_table([one for one in found if one.efficient])


def _print_table(found: list) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("first_layer", "ratio", "layers", "divergence", "agreement"):
        table.add_column(heading, justify="right")
    for one in found:
        last = one.first_layer + one.num_layers - 1
        table.add_row(
            str(one.first_layer),
            f"{one.ratio:.4g}",
            f"{one.first_layer}-{last}",
            f"{one.divergence:.4f}",
            f"{one.agreement:.0%}",
        )
    Console().print(table)
