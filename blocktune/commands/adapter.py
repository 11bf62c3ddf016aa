"""`blocktune merge` and `blocktune push`: what is done with a finished adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from blocktune.commands import command
from blocktune.commands import options as opt


@command(
    "merge",
    "blocktune merge out/block --output out/merged",
    "blocktune answer --adapter out/merged -i questions.jsonl --method block-attention",
    "blocktune merge out/kvlink --output out/merged-links --links added_tokens",
    "An adapter trained on a 4-bit base is merged into the base's weights as plain "
    "numbers; the command measures what quantising the result again would lose.",
)
def merge(
    adapter: Annotated[str, Argument(help="A folder, or USER/NAME\\[@REVISION].")],
    output: Annotated[Path, Option("--output", "-o", help="New folder for the model.")],
    model: Annotated[
        str | None, Option("--model", "-m", help="Base model. Default: the adapter's own.")
    ] = None,
    links: Annotated[
        str | None,
        Option(
            help="Where link tokens go: table (a file beside the model) or added_tokens (in its "
            "vocabulary). Default: as trained."
        ),
    ] = None,
    dtype: opt.Dtype = "auto",
    device: opt.Device = None,
    as_json: opt.AsJson = False,
) -> None:
    """Merge an adapter into its base and report how far the logits move."""
    opt.quiet_libraries()
    from blocktune.adapter.merge import merge_adapter

    report = merge_adapter(adapter, output, model=model, dtype=dtype, device=device, links=links)
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2))
        return
    typer.echo(
        f"merged into {report.output}: logits within {report.max_abs_diff:.1e} of base and "
        f"adapter (largest logit {report.max_abs_logit:.1f}, same top token in "
        f"{report.same_top1:.1%} of the probe)"
    )
    if report.requantised_max_abs_diff is not None:
        typer.echo(
            f"the adapter was trained on a {report.quantization} base and the merged weights are "
            f"not quantised; quantised to {report.quantization} again, logits differ by "
            f"{report.requantised_max_abs_diff:.1e}"
        )


@command(
    "push",
    "blocktune push out/block --repo USER/NAME --dry-run   # show the files and the card",
    "blocktune push out/block --repo USER/NAME --results out/eval/results.json",
    "blocktune push out/block --repo USER/NAME --base-model ORG/BASE --license apache-2.0",
    "blocktune answer --adapter USER/NAME -i questions.jsonl --method block-attention",
    "Log in first with `hf auth login`, or set HF_TOKEN.",
)
def push(
    adapter: Annotated[Path, Argument(help="Folder from `blocktune train` or `merge`.")],
    repo: Annotated[str, Option(help="USER/NAME on the HF Hub; created if missing.")],
    dry_run: Annotated[
        bool, Option("--dry-run", help="Check, show every file and the card, send nothing.")
    ] = False,
    private: Annotated[
        bool, Option("--private", help="Make the repository private if it is new.")
    ] = False,
    base_model: Annotated[
        str | None, Option(help="Name of the base on the Hub, if it was trained from a local copy.")
    ] = None,
    license: Annotated[
        str | None, Option(help="Such as apache-2.0. Default: the base's own on the Hub.")
    ] = None,
    dataset: Annotated[
        list[str] | None, Option(help="Training data set on the Hub; repeatable.")
    ] = None,
    results: Annotated[
        Path | None, Option(help="results.json of `blocktune eval`, for the card's table.")
    ] = None,
    model: Annotated[
        str | None,
        Option("--model", "-m", help="Base model for the check. Default: the adapter's own."),
    ] = None,
    dtype: opt.Dtype = "auto",
    device: opt.Device = None,
) -> None:
    """Publish an adapter on the Hugging Face Hub, if `blocktune check` passes on it."""
    opt.quiet_libraries()
    from rich.console import Console

    from blocktune.hub import CardFacts, prepare, send, show

    facts = CardFacts(base_model, license, tuple(dataset or ()), results)
    publication = prepare(adapter, repo, facts, model=model, dtype=dtype, device=device)
    console = Console()
    if dry_run:
        show(publication, console)
        return
    sent = send(publication, private=private)
    console.print(f"pushed {len(publication.files)} files to {sent.url}", soft_wrap=True)
    console.print(f"load it with --adapter {repo}@{sent.revision}", soft_wrap=True)
