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
        "blocktune data worlds --split test --output out/test.jsonl",
        "blocktune answer --model data/tiny --input out/test.jsonl --limit 1",
        "blocktune train --config recipes/block_attention.yaml",
        "blocktune eval --suite eval/suites/quick.yaml --output out/quick",
        "Every command has its own examples: blocktune COMMAND --help",
    ),
)


def command(name: str, *examples: str, of: typer.Typer = app, **settings: Any) -> Callable:
    """Registers a function as a command whose help ends in examples.

    Args:
        name: Of the command.
        examples: Lines; those that start with ``blocktune`` or a space are shown as code.
        of: The group, if it is not a command of `blocktune` itself.
        settings: Further ones of `typer.Typer.command`.
    """
    return of.command(name, epilog=teach(*examples), **settings)
