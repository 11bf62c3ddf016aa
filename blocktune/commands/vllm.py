"""`blocktune vllm`: cached chunks on vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from blocktune.commands import app, command

group = typer.Typer(
    no_args_is_help=True, help="Serve cached chunks from vLLM.", rich_markup_mode="rich"
)
app.add_typer(group, name="vllm")


@group.callback()
def _root() -> None:
    """Keeps `serve` a subcommand while it is the only one."""


@command(
    "serve",
    "blocktune encode -m data/tiny --input docs.jsonl --store chunks/",
    "blocktune vllm serve data/tiny --store chunks/ --port 8000",
    "blocktune vllm serve M --store chunks/ --adapter legal=out/legal --adapter news=out/news",
    "blocktune vllm serve M --store chunks/ --tensor-parallel-size 4 --max-model-len 32768",
    "All other options are vLLM's. Point an OpenAI client at http://127.0.0.1:8000/v1",
    of=group,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Base model, as vLLM takes it.")],
    store: Annotated[str, Option(help="Encoded chunks: a folder or URL, as of `answer --store`.")],
    adapter: Annotated[
        list[str] | None,
        Option(
            help="Adapter that chunks were encoded with: a folder or a name on the HF Hub; "
            "NAME=ADAPTER sets the name that requests use. Repeatable."
        ),
    ] = None,
    encode_wait: Annotated[
        float,
        Option(min=0, help="Seconds that a request waits for `blocktune encode --follow`."),
    ] = 30.0,
    host_gb: Annotated[float, Option(min=0, help="Memory for hot chunks, in each rank.")] = 1.0,
    fingerprint: Annotated[
        str | None, Option(help="Of the base's chunks, if the store has several that fit.")
    ] = None,
) -> None:
    """Start vLLM's server with cached chunks, and chat completions over `documents`."""
    from blocktune.vllm import launch

    parts = [text.partition("=") for text in adapter or ()]
    named = {name if tail else Path(name).name: tail or name for name, _, tail in parts}
    extra = {"encode_wait_s": encode_wait, "host_gb": host_gb, "fingerprint": fingerprint}
    launch.serve(model, named, store, context.args, **extra)
