"""What a run is going to do, before it does it, and one line per log after."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from transformers import TrainerCallback

from blocktune.training.trainer import BlockSFTTrainer


@dataclass(frozen=True)
class TrainingPlan:
    """The size of a run.

    Attributes:
        base_model: What is trained.
        layout: Of block examples, with the share of the rest.
        execution: Of attention.
        trainable: Parameters that get gradients.
        parameters: All parameters.
        examples: In the training set.
        dropped: Left out as too long.
        mean_tokens: Per example.
        max_tokens: Of the longest example.
        world_size: Processes.
        global_batch: Examples per optimizer step, over accumulation and processes.
        steps: Optimizer steps.
    """

    base_model: str
    layout: str
    execution: str
    trainable: int
    parameters: int
    examples: int
    dropped: int
    mean_tokens: float
    max_tokens: int
    world_size: int
    global_batch: int
    steps: int

    @property
    def tokens_per_step(self) -> int:
        """Expected tokens of one optimizer step, without padding."""
        return round(self.mean_tokens * self.global_batch)


def make_plan_of(trainer: BlockSFTTrainer, num_dropped: int = 0) -> TrainingPlan:
    """Reads the plan off a trainer that has not started."""
    args, info = trainer.args, trainer.files.info
    lengths = trainer.train_dataset["length"]
    counts = [(p.numel(), p.requires_grad) for p in trainer.model.parameters()]
    per_rank = math.ceil(len(lengths) / (args.per_device_train_batch_size * args.world_size))
    per_epoch = math.ceil(per_rank / args.gradient_accumulation_steps)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch)
    spec = info.layout
    links = f", {spec.num_links} links {spec.link_side} each ({info.link_mode})"
    layout = f"block {args.block_share:.0%}, {spec.placement}{links if spec.num_links else ''}"
    return TrainingPlan(
        base_model=info.base_model,
        layout=layout + (", shared prefix" if spec.shared_prefix else ""),
        execution=args.attention_execution,
        trainable=sum(count for count, trained in counts if trained),
        parameters=sum(count for count, _ in counts),
        examples=len(lengths),
        dropped=num_dropped,
        mean_tokens=sum(lengths) / len(lengths),
        max_tokens=max(lengths),
        world_size=args.world_size,
        global_batch=args.per_device_train_batch_size
        * args.gradient_accumulation_steps
        * args.world_size,
        steps=steps,
    )


def print_plan(plan: TrainingPlan, console: Console | None = None) -> None:
    """Prints the plan as a table."""
    share = plan.trainable / plan.parameters
    table = Table("", "", title="training plan", show_header=False, title_justify="left")
    table.add_row("base", plan.base_model)
    table.add_row("layout", plan.layout)
    table.add_row("attention", plan.execution)
    table.add_row("trainable", f"{plan.trainable:,} of {plan.parameters:,} ({share:.2%})")
    table.add_row("examples", f"{plan.examples:,} ({plan.dropped:,} dropped as too long)")
    table.add_row("tokens", f"{plan.mean_tokens:,.0f} an example, longest {plan.max_tokens:,}")
    table.add_row("batch", f"{plan.global_batch} examples over {plan.world_size} process(es)")
    table.add_row("tokens per step", f"{plan.tokens_per_step:,}")
    table.add_row("steps", f"{plan.steps:,}")
    (console or Console()).print(table)


class LogLines(TrainerCallback):
    """One line per log: step, loss, accuracy, learning rate, tokens per second."""

    def __init__(self, console: Console | None = None):
        self.console = console or Console()
        self._last = (0.0, 0.0)

    def on_train_begin(self, args, state, control, **kwargs):
        """Starts the clock."""
        self._last = (time.perf_counter(), 0.0)

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Prints what was logged, on the main process."""
        if not state.is_world_process_zero or not logs:
            return
        if "loss" in logs:
            self.console.print(self._line(state, logs), highlight=False)
        elif "eval_loss" in logs:
            self.console.print(f"evaluation loss {logs['eval_loss']:.4f}", highlight=False)
        elif "train_runtime" in logs:
            self.console.print(f"trained in {logs['train_runtime']:.1f} s", highlight=False)

    def _line(self, state, logs) -> str:
        now, tokens = time.perf_counter(), float(logs.get("num_tokens", 0))
        speed = (tokens - self._last[1]) / max(now - self._last[0], 1e-9)
        self._last = (now, tokens)
        return (
            f"step {state.global_step:>5}/{state.max_steps}  loss {float(logs['loss']):.4f}  "
            f"accuracy {float(logs.get('mean_token_accuracy', 0)):.3f}  "
            f"lr {float(logs['learning_rate']):.2e}  {speed:,.0f} tokens/s"
        )
