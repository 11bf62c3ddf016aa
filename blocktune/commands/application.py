"""The application: how commands are registered, and how their errors are shown.

Mistakes are one line on standard error and exit code 2; tracebacks only when asked for.
"""

from __future__ import annotations

import locale
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Option
from typer.core import TyperGroup

import blocktune

EXTRAS = {
    "train": ("trl", "peft", "accelerate"),
    "eval": ("matplotlib", "rouge_score", "lm_eval"),
    "data": ("bm25s", "datasets", "sentencex", "pyarrow", "wonderwords"),
    "serve": ("fastapi", "uvicorn", "prometheus_client"),
    "remote": ("fsspec", "s3fs", "valkey"),
    "gguf": ("gguf",),
}
"""Packages by the extra that they come with."""
FAILURES = "BLOCKTUNE_FAILURES"
"""Variable of launched processes: a folder to leave ``RANK.txt`` in, instead of printing."""
PLUGIN = "--plugin"
USAGE_ERROR = typer.BadParameter.__base__
"""Wrong options and arguments: typer exports only this subclass of the error."""


class OneLineErrors(TyperGroup):
    """Shows what a user can fix as one line: wrong options or values, missing files or extras."""

    def parse_args(self, ctx, args):
        """Takes ``--plugin X`` anywhere on the line, before the command or among its options."""
        with _one_line("--debug" in args):
            return super().parse_args(ctx, plugins_first(args))

    def invoke(self, ctx):
        """Runs the command; ``ctx.obj`` is what the entry point wants called before."""
        with _one_line(ctx.params["debug"]):
            if ctx.obj is not None:
                ctx.obj()
            return super().invoke(ctx)


@contextmanager
def _one_line(debug: bool) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt as stop:
        _say("; ".join(["stopped", *map(str, stop.args)]))
        raise typer.Exit(130) from None
    except (typer.Exit, typer.Abort):
        raise
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(1) from None
    except Exception as error:
        line = explain(error)
        if debug or (line is None and FAILURES not in os.environ):
            raise
        if FAILURES in os.environ:
            _write(line, error)
        else:
            _say(f"error: {line}")
        raise typer.Exit(1 if line is None else 2) from None


def _write(line: str | None, error: Exception) -> None:
    """Leaves the line for the process that launched this one; a bug's trace follows it."""
    text = line or f"{type(error).__name__}: {' '.join(str(error).split())}"
    trace = "" if line else "".join(traceback.format_exception(error))
    path = Path(os.environ[FAILURES]) / os.environ.get("RANK", "0")
    path.with_suffix(".txt").write_text(f"{text}\n{trace}", errors="backslashreplace")


@contextmanager
def resumable(kept: str, how: str = "repeat the command to continue") -> Iterator[None]:
    """Inside the block, Ctrl-C says what the command finds again, and how to continue."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{kept}; {how}") from None


def plugins_first(args: list[str]) -> list[str]:
    """The same arguments with every ``--plugin X`` and ``--plugin=X`` in front."""
    moved, rest, waiting = [], [], list(args)
    while waiting:
        one = waiting.pop(0)
        if one == PLUGIN and waiting:
            moved += [one, waiting.pop(0)]
        else:
            (moved if one.startswith(f"{PLUGIN}=") else rest).append(one)
    return moved + rest


def explain(error: Exception) -> str | None:
    """What went wrong on one line, or None for a bug of ours, which wants its traceback."""
    if type(error).__name__ == "NoArgsIsHelpError":  # its text is the help
        return None
    if isinstance(error, USAGE_ERROR):
        path = error.ctx.command_path if error.ctx else "blocktune"
        return f"{error.format_message().rstrip('.')}; see `{path} --help`"
    if isinstance(error, RuntimeError):
        # By its name, since torch is not loaded here: only a full device can be fixed.
        return _full(error) if type(error).__name__ == "OutOfMemoryError" else None
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        extra = next((name for name, packages in EXTRAS.items() if package in packages), None)
        return extra and f"this needs the package '{package}'; run pip install 'blocktune[{extra}]'"
    if isinstance(error, OSError) and error.strerror and error.filename:
        # A folder is made where a file is, in its place or on the way there.
        reason = "Not a folder" if isinstance(error, FileExistsError) else error.strerror
        return f"{reason}: '{error.filename}'"
    if not isinstance(error, ValueError | OSError):
        return None
    hint = "; set PYTHONUTF8=1, since this locale is none of UTF-8"
    is_narrow = isinstance(error, UnicodeError) and locale.getencoding().lower() != "utf-8"
    return " ".join(str(error).split()) + hint * is_narrow


def _say(line: str) -> None:
    # Of several processes that fail alike, one says so: the launching one, or the first.
    if os.environ.get("RANK", "0") == "0" and FAILURES not in os.environ:
        print(line, file=sys.stderr)


def _full(error: Exception) -> str:
    said = " ".join(str(error).split()).partition(". ")[0]
    return (
        f"{said}; use smaller batches (per_device_train_batch_size, --batch-size), shorter rows "
        "(pack_length, max_length), gradient_checkpointing: true, or a 4-bit base "
        "(load_in_4bit, --quantize nf4)"
    )


def teach(*lines: str) -> str:
    """An epilogue of examples; commands are coloured, explanations are not."""
    shown = (f"  [cyan]{x}[/cyan]" if x.startswith(("blocktune", " ")) else x for x in lines)
    return "\n".join(["[bold]Examples[/bold]", *shown])


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


def new_group(name: str, text: str, *examples: str) -> typer.Typer:
    """A group of commands below the application."""
    made = typer.Typer(
        no_args_is_help=True,
        help=text,
        rich_markup_mode="rich",
        epilog=teach(*examples) if examples else None,
    )
    app.add_typer(made, name=name)
    return made


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"blocktune {blocktune.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
    debug: Annotated[
        bool, Option("--debug", envvar="BLOCKTUNE_DEBUG", help="Show tracebacks of errors.")
    ] = False,
    plugin: Annotated[
        list[str] | None,
        Option(
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
