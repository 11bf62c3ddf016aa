"""What a run prints while it trains: one line a log."""

from __future__ import annotations

import os
import sys

from rich.console import Console
from transformers import TrainerCallback


class SteadyConsole(Console):
    """A console that falls silent when nobody reads on, instead of ending the process.

    Rich leaves by ``SystemExit`` when its pipe is closed (``blocktune train ... | head``): a run
    would stop in the middle without an error, and its folder stay empty.
    """

    def on_broken_pipe(self) -> None:
        """Goes on in silence; the run still trains and saves."""
        self.quiet = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, whichever reads best."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def amount(size: float) -> str:
    """Bytes as MiB or GiB."""
    return f"{size / 2**20:.0f} MiB" if size < 2**30 else f"{size / 2**30:.1f} GiB"


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
        f"MFU {logs['mfu']:.0%}",
        f"{duration(logs['eta_s'])} left",
    ]
    if "divergence" in logs:
        words.insert(2, f"KL {float(logs['divergence']):.4f}")
    return "  ".join(words)
