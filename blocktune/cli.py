"""The command line: one file per command in ``blocktune/commands``, loaded without torch."""

from typing import Annotated

import typer

import blocktune
from blocktune.commands import (
    answer,
    bench,
    check,
    data,
    encode,
    evaluate,
    intervals,
    merge,
    methods,
    push,
    train,
    tune,
)
from blocktune.commands.errors import PLUGIN, OneLineErrors
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
        "Every command shows examples of its own: blocktune COMMAND --help",
    ),
)
answer.add_to(app)
bench.add_to(app)
check.add_to(app)
data.add_to(app)
encode.add_to(app)
evaluate.add_to(app)
intervals.add_to(app)
merge.add_to(app)
methods.add_to(app)
push.add_to(app)
train.add_to(app)
tune.add_to(app)


def _add_plugins(named: list[str] | None) -> None:
    from blocktune import plugins

    for plugin in named or ():
        plugins.add(plugin)


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
        typer.Option(
            "--debug",
            envvar="BLOCKTUNE_DEBUG",
            help="Show tracebacks, not one line.",
        ),
    ] = False,
    plugin: Annotated[
        list[str] | None,
        typer.Option(
            PLUGIN,
            metavar="FILE|MODULE",
            help="Python that adds a method, a selector or a reshape; repeatable, for any command. "
            "Also $BLOCKTUNE_PLUGINS and entry points of the group blocktune.plugins.",
        ),
    ] = None,
) -> None:
    """Fine-tune, cache and reuse retrieved chunks with any RoPE decoder of Hugging Face."""
    _add_plugins(plugin)


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
