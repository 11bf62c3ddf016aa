"""Options that the commands on data share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Source = Annotated[str, typer.Argument(help="Where examples come from; see `blocktune data list`.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="JSONL file to write.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Only the first examples.")]
Split = Annotated[
    str | None,
    typer.Option(help="Split of a data set on the Hub; default validation, if it has one."),
]
Counter = Annotated[
    str | None,
    typer.Option(
        "--tokenizer", help="Whose tokens lengths are in: a folder or a name on the HF Hub."
    ),
]


def tokenizer_of(name: str | None):
    """The tokenizer of that name, or None for None."""
    from blocktune.commands.options import quiet_libraries
    from blocktune.data.sources.options import load_tokenizer

    quiet_libraries()
    return None if name is None else load_tokenizer(name)
