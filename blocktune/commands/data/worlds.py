"""`blocktune data worlds`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated
from urllib.parse import urlencode

import typer

from blocktune.commands.options import teach


def add_to(group: typer.Typer) -> None:
    """Registers the command."""
    group.command(
        "worlds",
        epilog=teach(
            "blocktune data worlds --output test.jsonl --split test --n 500",
            "blocktune data worlds -o hop.jsonl --kinds 2-hop,comparison --passages 4-10 --seed 3",
        ),
    )(worlds)


def worlds(
    output: Annotated[Path, typer.Option("--output", "-o", help="JSONL file to write.")],
    n: Annotated[int, typer.Option(min=1, help="Number of questions.")] = 500,
    split: Annotated[
        str, typer.Option(help="train, dev or test: no name occurs in two of them.")
    ] = "train",
    seed: Annotated[int, typer.Option(help="Another seed, another world.")] = 0,
    kinds: Annotated[
        str | None, typer.Option(help="Kinds of question, with commas between; default a mix.")
    ] = None,
    passages: Annotated[
        str | None, typer.Option(help="Chunks per question: a number or LOW-HIGH.")
    ] = None,
) -> None:
    """Generate multi-hop questions over made-up people, places, films and works."""
    from blocktune.data import load_examples, write_jsonl
    from blocktune.files import replacing

    options = {"seed": seed, "n": n, "kinds": kinds, "passages": passages}
    query = urlencode({key: value for key, value in options.items() if value is not None}, safe=",")
    examples = load_examples(f"worlds:{split}?{query}")
    with replacing(output) as temporary:
        count = write_jsonl(temporary, examples)
    typer.echo(f"wrote {count:,} questions to {output}")
