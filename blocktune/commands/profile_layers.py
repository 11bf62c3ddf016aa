"""`blocktune profile-layers`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from blocktune.commands.options import (
    Adapter,
    AsJson,
    Device,
    Dtype,
    Limit,
    Model,
    Quantize,
    load_engine,
    teach,
)


def add_to(app: typer.Typer) -> None:
    """Registers the command."""
    app.command(
        "profile-layers",
        epilog=teach(
            "blocktune profile-layers -m data/tiny -i 'worlds:dev?n=32'",
            "blocktune profile-layers -m M -i held_out.jsonl --limit 50 --most-layers 8 --json",
            "Use the result as parameters of the method:",
            "blocktune answer -m M -i q.jsonl --method 'droidspeak first_layer=9 ratio=0.125'",
        ),
    )(profile_layers)


def profile_layers(
    source: Annotated[
        str, typer.Option("--input", "-i", help="Held-out questions: JSONL or any data source.")
    ],
    model: Model = None,
    adapter: Adapter = None,
    limit: Limit = None,
    most_layers: Annotated[
        int | None, typer.Option(min=1, help="Longest range of layers to try. Default: all.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions per batch.")] = 8,
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Measure which layers are worth recomputing for all chunks: the profile for `droidspeak`."""
    from rich.console import Console
    from rich.progress import track

    from blocktune.commands.answering import read_examples
    from blocktune.engine.layer_profile import profile_layers
    from blocktune.tables import Table

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
        typer.echo(json.dumps([asdict(one) for one in found], indent=2))
        return
    rows = [
        (
            str(one.first_layer),
            f"{one.ratio:.4g}",
            f"{one.first_layer}-{one.first_layer + one.num_layers - 1}",
            f"{one.divergence:.4f}",
            f"{one.agreement:.0%}",
        )
        for one in found
        if one.efficient
    ]
    Table(("first_layer", "ratio", "layers", "divergence", "agreement"), rows).show()
