"""The command line: commands are in ``blocktune/commands``, imported without torch."""

from typing import Annotated

import typer

import blocktune
from blocktune.commands import (
    adapter,
    answer,
    bench,
    check,
    data,
    encode,
    evaluate,
    methods,
    profile_layers,
    serve,
    train,
)
from blocktune.commands.errors import PLUGIN, OneLineErrors
from blocktune.commands.options import teach

COMMANDS = (
    *(answer, train, evaluate, serve, data, methods, check, encode, adapter),
    *(profile_layers, bench),
)

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
for command in COMMANDS:
    command.add_to(app)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"blocktune {blocktune.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
    debug: Annotated[
        bool,
        typer.Option("--debug", envvar="BLOCKTUNE_DEBUG", help="Show tracebacks of errors."),
    ] = False,
    plugin: Annotated[
        list[str] | None,
        typer.Option(
            PLUGIN,
            metavar="FILE|MODULE",
            help="Python file or module that adds methods, selectors or reshapes; repeatable, for "
            "any command. Also $BLOCKTUNE_PLUGINS and entry points of the group blocktune.plugins.",
        ),
    ] = None,
) -> None:
    """Fine-tune, cache and reuse retrieved chunks with any RoPE decoder of Hugging Face."""
    from blocktune import plugins

    for name in plugin or ():
        plugins.add(name)


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
