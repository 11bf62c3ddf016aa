"""`blocktune push`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from blocktune.commands.options import Device, Dtype, quiet_libraries, teach


def add_to(app: typer.Typer) -> None:
    """Registers the command."""
    app.command(
        "push",
        epilog=teach(
            "blocktune push out/block --repo USER/NAME --dry-run   # show the files and the card",
            "blocktune push out/block --repo USER/NAME --results out/eval/results.json",
            "blocktune push out/block --repo USER/NAME --base-model ORG/BASE --license apache-2.0",
            "blocktune answer --adapter USER/NAME -i questions.jsonl --method block-attention",
            "Log in first with `hf auth login`, or set HF_TOKEN.",
        ),
    )(push)


def push(
    adapter: Annotated[Path, typer.Argument(help="Folder made by `blocktune train` or `merge`.")],
    repo: Annotated[str, typer.Option(help="USER/NAME on the HF Hub; made if it is not there.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check, show every file and the card, send nothing.")
    ] = False,
    private: Annotated[
        bool, typer.Option("--private", help="Make the repository private if it is new.")
    ] = False,
    base_model: Annotated[
        str | None, typer.Option(help="The base's name on the Hub, if it was trained from a copy.")
    ] = None,
    license: Annotated[
        str | None, typer.Option(help="Such as apache-2.0; by default the base's own on the Hub.")
    ] = None,
    dataset: Annotated[
        list[str] | None, typer.Option(help="Data set on the Hub it was trained on; repeatable.")
    ] = None,
    results: Annotated[
        Path | None, typer.Option(help="results.json of `blocktune eval`, for the card's table.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Where the base is, to check the adapter.")
    ] = None,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Publish an adapter on the Hugging Face Hub, if `blocktune check` passes on it."""
    quiet_libraries()
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
