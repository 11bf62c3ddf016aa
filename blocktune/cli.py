"""The command line: commands are in ``blocktune/commands``, imported without torch."""

import os
from importlib import import_module
from typing import Annotated

import typer

import blocktune
from blocktune.commands import app
from blocktune.commands.errors import PLUGIN

# In the order of the help.
for topic in (
    "answer",
    "train",
    "evaluate",
    "serve",
    "vllm",
    "data",
    "make_data",
    "methods",
    "store",
    "check",
    "bench",
    "adapter",
):
    import_module(f"blocktune.commands.{topic}")


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
        bool, typer.Option("--debug", envvar="BLOCKTUNE_DEBUG", help="Show tracebacks of errors.")
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
    if os.environ.get("COLUMNS") == "0":  # a terminal without a size yet: rich would print nothing
        del os.environ["COLUMNS"]
    app()


if __name__ == "__main__":
    main()
