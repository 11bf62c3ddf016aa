"""The commands by topic; heavy packages are imported when a command runs."""

from collections.abc import Callable
from typing import Any

import typer

from blocktune.commands.errors import OneLineErrors
from blocktune.commands.options import teach

app = typer.Typer(
    cls=OneLineErrors,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
    epilog=teach(
        "blocktune data write 'worlds:test?n=500' --output out/test.jsonl",
        "blocktune answer --model data/tiny --input out/test.jsonl --limit 1",
        "blocktune train --config recipes/block_attention.yaml",
        "blocktune eval --suite eval/suites/quick.yaml --output out/quick",
        "Every command has its own examples: blocktune COMMAND --help",
    ),
)


def command(name: str, *examples: str, of: typer.Typer = app, **settings: Any) -> Callable:
    """Registers a function as a command of a group, whose help ends in examples (see `teach`)."""
    return of.command(name, epilog=teach(*examples), **settings)
