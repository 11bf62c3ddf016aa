"""The command line."""

from typing import Annotated

import typer

import blocktune

app = typer.Typer(no_args_is_help=True)


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False):
    """Fine-tune, cache and reuse retrieved chunks."""
    if version:
        typer.echo(blocktune.__version__)


def main() -> None:
    """Entry point of the console script."""
    app()
