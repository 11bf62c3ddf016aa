"""`blocktune merge`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from blocktune.commands.options import AsJson, Device, Dtype, quiet_libraries, teach


def add_to(app: typer.Typer) -> None:
    """Registers the command."""
    app.command(
        "merge",
        epilog=teach(
            "blocktune merge out/block --output out/merged",
            "blocktune answer --adapter out/merged -i questions.jsonl --method block-attention",
            "blocktune merge out/kvlink --output out/merged --links added_tokens",
            "An adapter trained on a 4-bit base is merged into that base's codes, read back as "
            "plain weights; what quantising the result again would lose is measured and said.",
        ),
    )(merge)


def merge(
    adapter: Annotated[str, typer.Argument(help="A folder, or USER/NAME\\[@REVISION].")],
    output: Annotated[Path, typer.Option("--output", "-o", help="New folder for the model.")],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="The base, if not where the adapter says.")
    ] = None,
    links: Annotated[
        str | None,
        typer.Option(help="table (beside the model) or added_tokens (in its vocabulary)."),
    ] = None,
    dtype: Dtype = "auto",
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Merge an adapter into its base, and say how far the result is from the two apart."""
    quiet_libraries()
    from blocktune.adapter.merge import merge_adapter

    report = merge_adapter(adapter, output, model=model, dtype=dtype, device=device, links=links)
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2))
        return
    typer.echo(
        f"merged into {report.output}: logits within {report.max_abs_diff:.1e} of the adapter on "
        f"its base (largest logit {report.max_abs_logit:.1f}, likeliest token the same in "
        f"{report.same_top1:.1%} of the probe)"
    )
    if report.requantised_max_abs_diff is not None:
        typer.echo(
            f"the adapter was trained on a base in {report.quantization}; the merged weights are "
            f"plain. Quantised to {report.quantization} again, their logits are off by "
            f"{report.requantised_max_abs_diff:.1e}"
        )
