"""What `blocktune train` prints: a line for each log, and the list of every option."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import MISSING, fields

from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import TrainerCallback


class SteadyConsole(Console):
    """A console that falls silent when its pipe is closed (``blocktune train ... | head``).

    Rich would raise ``SystemExit``: a run would stop halfway without an error or an adapter.
    """

    def on_broken_pipe(self) -> None:
        """Discards all further output."""
        self.quiet = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, whichever reads best."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class LogLines(TrainerCallback):
    """One line per log: step, loss, accuracy, learning rate, speed, and the time that is left."""

    def __init__(self, console: Console | None = None):
        self.console = console or SteadyConsole()

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Prints what was logged, on the main process."""
        if not state.is_world_process_zero or not logs:
            return
        if "loss" in logs:
            self.console.print(_line(state, logs), highlight=False, soft_wrap=True)
        elif "eval_loss" in logs:
            self.console.print(f"evaluation loss {logs['eval_loss']:.4f}", highlight=False)
        elif "train_runtime" in logs:
            self.console.print(f"trained in {logs['train_runtime']:.1f} s", highlight=False)


def _line(state, logs) -> str:
    words = [
        f"step {state.global_step:>5}/{state.max_steps}",
        f"loss {float(logs['loss']):.4f}",
        f"accuracy {float(logs.get('mean_token_accuracy', 0)):.3f}",
        f"lr {float(logs['learning_rate']):.2e}",
        f"{logs['tokens_per_second']:,.0f} tokens/s",
        *([f"MFU {logs['mfu']:.0%}"] if "mfu" in logs else []),
        f"{duration(logs['eta_s'])} left",
    ]
    if "divergence" in logs:
        words.insert(2, f"KL {float(logs['divergence']):.4f}")
    return "  ".join(words)


def print_options(console: Console | None = None) -> None:
    """Prints every key with its default and what it means, a table for each group."""
    from trl import ModelConfig

    from blocktune.training import config

    groups = {
        "Data and wording": config.DataArgs.__annotations__,
        "Layout": config.LayoutOptions.__annotations__,
        "Objective": config.ObjectiveOptions.__annotations__,
        "Batches": config.BatchOptions.__annotations__,
        "The run": config.BlockSFTConfig.__annotations__,
        "Model, LoRA and quantisation, by TRL": ModelConfig.__annotations__,
        "Training, by TRL and transformers": [f.name for f in fields(config.BlockSFTConfig)],
    }
    holders, console = (config.DataArgs, config.BlockSFTConfig, ModelConfig), console or Console()
    left = {field.name: field for holder in holders for field in fields(holder) if field.init}
    for title, names in groups.items():
        table = Table("key", "default", "meaning", title=title, title_justify="left", box=None)
        for field in [left.pop(name) for name in names if name in left]:
            made = field.default_factory is not MISSING
            value = field.default_factory() if made else field.default
            shown = repr(value) if isinstance(value, str) else str(getattr(value, "value", value))
            # The first sentence: transformers' texts have several paragraphs.
            text = " ".join(str(field.metadata.get("help", "")).split())
            meaning = re.split(r"(?<=\w\w\w)\.\s", text, maxsplit=1)[0].removesuffix(".")
            table.add_row(Text(field.name, "cyan"), Text(shown), Text(meaning))
        console.print(table, "")
