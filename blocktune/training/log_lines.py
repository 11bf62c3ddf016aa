"""What a run says while it trains: one line a log."""

from __future__ import annotations

from rich.console import Console
from transformers import TrainerCallback

from blocktune.training.console import SteadyConsole, duration


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
