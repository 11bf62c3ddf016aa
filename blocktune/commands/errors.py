"""Mistakes as one line on standard error and exit code 2; tracebacks only when asked for."""

from __future__ import annotations

import os
import sys

import typer
from typer.core import TyperGroup

EXTRAS = {
    "trl": "train",
    "peft": "train",
    "accelerate": "train",
    "matplotlib": "eval",
    "rouge_score": "eval",
    "lm_eval": "eval",
    "bm25s": "data",
    "datasets": "data",
    "sentencex": "data",
    "pyarrow": "data",
    "wonderwords": "data",
}
"""Packages that come with an extra, and its name."""


PLUGIN = "--plugin"


class OneLineErrors(TyperGroup):
    """Shows what a user can mend as one line: wrong values, missing files, missing extras."""

    def parse_args(self, ctx, args):
        """Takes ``--plugin X`` wherever it stands, before the command or among its options."""
        return super().parse_args(ctx, plugins_first(args))

    def invoke(self, ctx):
        """Runs the command.

        Raises:
            typer.Exit: With code 2 after the line was printed.
        """
        try:
            return super().invoke(ctx)
        except (ValueError, OSError, ModuleNotFoundError, RuntimeError) as error:
            line = explain(error)
            if ctx.params["debug"] or line is None:
                raise
            # Of several processes that fail alike, one says so.
            if os.environ.get("RANK", "0") == "0":
                print(f"error: {line}", file=sys.stderr)
            raise typer.Exit(2) from None


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
    if isinstance(error, RuntimeError):
        # By its name, since torch is not loaded here: only a device that is full can be mended.
        return _full(error) if type(error).__name__ == "OutOfMemoryError" else None
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            return None
        extra = EXTRAS[package]
        return f"this needs the package '{package}'; run pip install 'blocktune[{extra}]'"
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.strerror}: '{error.filename}'"
    return " ".join(str(error).split())


def _full(error: Exception) -> str:
    said = " ".join(str(error).split()).partition(". ")[0]
    return (
        f"{said}; take smaller batches (per_device_train_batch_size, --batch-size), shorter rows "
        "(pack_length, max_length), gradient_checkpointing: true, or a base in 4 bits "
        "(load_in_4bit, --quantize nf4)"
    )
