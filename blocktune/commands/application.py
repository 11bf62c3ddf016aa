"""The application: registers commands, and shows a user's mistake on one line, with exit code 2."""

import locale
import os
import re
import sqlite3
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup

import blocktune
from blocktune import plugins
from blocktune.commands.options import option
from blocktune.parsing import first_line

EXTRAS = {  # the packages that each extra of blocktune installs
    "train": ("trl", "peft", "accelerate"),
    "eval": ("matplotlib", "rouge_score", "lm_eval"),
    "data": ("bm25s", "datasets", "sentencex", "pyarrow", "wonderwords"),
    "serve": ("fastapi", "uvicorn", "prometheus_client"),
    "remote": ("fsspec", "s3fs", "valkey"),
    "gguf": ("gguf",),
}
FAILURES = "BLOCKTUNE_FAILURES"  # names a folder for launched processes' errors (``RANK.txt``)
PLUGIN = "--plugin"
PLUGINS = (
    "Python file or module that adds methods or their parts, for any command; repeatable. Also "
)
PLUGINS += "$BLOCKTUNE_PLUGINS and entry points of the group blocktune.plugins."
USAGE_ERROR = typer.BadParameter.__base__  # wrong options or arguments; typer does not export it


class OneLineErrors(TyperGroup):
    """Shows errors that a user can fix on one line: wrong options, missing files or extras."""

    def parse_args(self, ctx, args):
        """Accepts ``--plugin X`` anywhere: before the command or among its options."""
        with _one_line("--debug" in args):
            return super().parse_args(ctx, plugins_first(args))

    def invoke(self, ctx):
        """Runs the command."""
        with _one_line(ctx.params["debug"]):
            return super().invoke(ctx)


@contextmanager
def _one_line(debug: bool) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt as stop:
        _print_error("; ".join(["stopped", *map(str, stop.args)]))
        raise typer.Exit(130) from None
    except (typer.Exit, typer.Abort):
        raise
    except BrokenPipeError:  # the reader, such as `| head`, stopped reading
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(1) from None
    except Exception as error:
        line = explain(error)
        if (place := plugins.place_of(error)) is not None:
            line = line or f"{type(error).__name__}: {first_line(error)}; --debug shows where"
            line += f" ({place})"
        if debug or (line is None and FAILURES not in os.environ):
            raise
        _print_error(f"error: {line}")
        if FAILURES in os.environ:  # for the launching process to read
            trace = "".join(traceback.format_exception(error))
            text = line or f"{type(error).__name__}: {' '.join(str(error).split())}\n{trace}"
            path = Path(os.environ[FAILURES]) / f"{os.environ.get('RANK', 0)}.txt"
            path.write_text(text, errors="backslashreplace")
        raise typer.Exit(1 if line is None else 2) from None


@contextmanager
def resumable(kept: str) -> Iterator[None]:
    """On Ctrl-C inside the block, reports what was ``kept`` and how to continue."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{kept}; repeat the command to continue") from None


def plugins_first(args: list[str]) -> list[str]:
    """Moves every ``--plugin X`` and ``--plugin=X`` to the front of the arguments."""
    named, others = [], []
    for before, arg, after in zip([None, *args], args, [*args[1:], None], strict=False):
        is_own = before == PLUGIN or (arg == PLUGIN and after is not None)
        is_own = is_own or arg.startswith(f"{PLUGIN}=")
        (named if is_own else others).append(arg)
    return named + others


def explain(error: Exception) -> str | None:
    """Explains an error on one line. Returns None for a bug, which should show its traceback."""
    if type(error).__name__ == "NoArgsIsHelpError":  # its text is the help
        return None
    if isinstance(error, USAGE_ERROR):
        path = error.ctx.command_path if error.ctx else "blocktune"
        return f"{error.format_message().rstrip('.')}; see `{path} --help`"
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported
        return (
            f"{' '.join(str(error).split()).partition('. ')[0]}; use smaller batches "
            "(per_device_train_batch_size, --batch-size), shorter rows (pack_length, max_length), "
            "gradient_checkpointing: true, or a 4-bit base (load_in_4bit, --quantize nf4)"
        )
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        if package == "vllm":
            return "vLLM is not installed here; it needs its own environment, docs/vllm.md"
        extra = next((name for name, packages in EXTRAS.items() if package in packages), None)
        return extra and f"this needs the package '{package}'; run pip install 'blocktune[{extra}]'"
    if isinstance(error, ImportError) and error.name is None:  # raised by hand, with advice
        return " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror and error.filename:
        # FileExistsError: a folder was to be created where a file is, or below a file.
        reason = "Not a folder" if isinstance(error, FileExistsError) else error.strerror
        return f"{reason}: '{error.filename}'"
    # torch and safetensors, which are not imported, have errors of their own for a full disk.
    if re.search("unexpected pos [0-9]|failed writing file|^Error while seriali.*I/O", str(error)):
        return f"cannot write a file ({' '.join(str(error).split())}); make space on the disk"
    if isinstance(error, sqlite3.Error):
        return f"the index of the store cannot be used: {error}; repeat the command"
    if not isinstance(error, ValueError | OSError):
        return None
    is_narrow = isinstance(error, UnicodeError) and locale.getencoding().lower() != "utf-8"
    hint = "; set PYTHONUTF8=1, since this locale does not use UTF-8" * is_narrow
    return " ".join(str(error).split()) + hint


def _print_error(line: str) -> None:
    # Ranks above 0 name themselves: torchrun stops the others once one has failed.
    if FAILURES not in os.environ:
        rank = os.environ.get("RANK", "0")
        print(line if rank == "0" else f"rank {rank}: {line}", file=sys.stderr)


def teach(*lines: str) -> str:
    """The examples at the end of a command's help, whose commands fit in 80 columns."""
    shown = ["[bold]Examples[/bold]"]
    for x in lines:
        if x.startswith(("blocktune ", "torchrun ", "git ", "kva ", " ")):
            x = re.sub(r"(?=.{84})(.{38,80}) (?=-)", "\\1 \\\\\n      ", f"  [cyan]{x}") + "[/cyan]"
        shown.append(x)
    return "\n".join(shown)


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
        "Every command has examples of its own: blocktune COMMAND --help",
    ),
)


def command(*examples: str, of: typer.Typer = app, **settings: Any) -> Callable:
    """Registers a function as the command of its name. Its help ends with ``examples``."""
    return of.command(epilog=teach(*examples), **settings)


def new_group(name: str, text: str, *examples: str) -> Callable:
    """Adds a group of commands to the application and returns `command` for it."""
    shown = {"help": text, "epilog": teach(*examples), "rich_markup_mode": "rich"}
    app.add_typer(group := typer.Typer(no_args_is_help=True, **shown), name=name)
    group.callback()(lambda: None)  # else the only command of a group would be the group
    return partial(command, of=group)


def _version(requested: bool) -> None:
    if requested:
        typer.echo(f"blocktune {blocktune.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: option(
        bool, "Show the version.", "--version", callback=_version, is_eager=True
    ) = False,
    debug: option(bool, "Show an error's traceback.", "--debug", envvar="BLOCKTUNE_DEBUG") = False,
    plugin: option(list[str] | None, PLUGINS, PLUGIN, metavar="FILE|MODULE") = None,
) -> None:
    """Fine-tune, serve and evaluate RoPE decoders that answer from cached chunks of text."""
    for name in plugin or ():
        plugins.add(name)
