"""What a run is going to do, before it does it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from transformers.trainer_utils import IntervalStrategy

from blocktune.attention.masks import KEPT_CELLS
from blocktune.models.quantize import quantization_of
from blocktune.models.sharded import num_elements
from blocktune.prompt import LayoutSpec
from blocktune.training.console import SteadyConsole, amount, duration
from blocktune.training.cost import EFFICIENCY, peak_bytes

if TYPE_CHECKING:
    from blocktune.training.dataset import Prepared
    from blocktune.training.trainer import BlockSFTTrainer


@dataclass(frozen=True)
class TrainingPlan:
    """The size of a run.

    Attributes:
        base_model: What is trained.
        dtype: Of its weights in memory.
        layout: Of block examples, with the share of the rest.
        objective: What the loss is.
        execution: Of attention.
        trainable: Parameters that get gradients.
        parameters: All parameters.
        examples: In the training set; one in both modes counts twice.
        rows: What they are packed into, the same number without packing.
        dropped: Left out as too long.
        mean_tokens: Per row.
        max_tokens: Of the longest row.
        world_size: Processes.
        global_batch: Rows per optimizer step, over accumulation and processes.
        steps: Optimizer steps.
        peak_bytes: Expected peak memory of a process without sharding, estimated.
        eta_s: Expected seconds, estimated at `EFFICIENCY` of the measured matmul rate.
        evaluation: On what and how often a loss is told, or None.
    """

    base_model: str
    dtype: str
    layout: str
    objective: str
    execution: str
    trainable: int
    parameters: int
    examples: int
    rows: int
    dropped: int
    mean_tokens: float
    max_tokens: int
    world_size: int
    global_batch: int
    steps: int
    peak_bytes: float
    eta_s: float
    evaluation: str | None = None

    @property
    def tokens_per_step(self) -> int:
        """Expected tokens of one optimizer step, without padding."""
        return round(self.mean_tokens * self.global_batch)


def make_plan_of(trainer: BlockSFTTrainer, prepared: Prepared) -> TrainingPlan:
    """Reads the plan off a trainer that has not started, and its training set."""
    args, info = trainer.args, trainer.files.info
    dataset = prepared.dataset
    taught = zip(dataset["length"], dataset["answer_length"], strict=True)
    lengths = [length for length, answer in taught if answer]
    counts = [(num_elements(p), p.requires_grad) for p in trainer.model.parameters()]
    per_rank = math.ceil(len(lengths) / (args.per_device_train_batch_size * args.world_size))
    per_epoch = math.ceil(per_rank / args.gradient_accumulation_steps)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch)
    mean = sum(lengths) / len(lengths)
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    speed = trainer.speed
    operations = speed.flops_per_token * mean * batch * steps * trainer.collator.row_growth
    return TrainingPlan(
        base_model=info.base_model,
        dtype=_dtype(trainer),
        layout=describe_layout(
            info.layout, prepared.num_block / prepared.num_examples, args.both_modes, info.link_mode
        ),
        objective=describe_objective(args),
        execution=args.attention_execution,
        trainable=sum(count for count, trained in counts if trained),
        parameters=sum(count for count, _ in counts),
        examples=prepared.num_examples,
        rows=len(lengths),
        dropped=prepared.num_dropped,
        mean_tokens=mean,
        max_tokens=max(lengths),
        world_size=args.world_size,
        global_batch=batch,
        steps=steps,
        peak_bytes=_peak(trainer, max(lengths)),
        eta_s=operations / (EFFICIENCY * speed.rate),
        evaluation=_evaluation(trainer),
    )


def _dtype(trainer: BlockSFTTrainer) -> str:
    model, args = trainer.model, trainer.args
    computed = "bfloat16" if args.bf16 else "float16" if args.fp16 else None
    held = quantization_of(model) or str(model.dtype).removeprefix("torch.")
    return held if computed in (None, held) else f"{held}, computed in {computed}"


def _evaluation(trainer: BlockSFTTrainer) -> str | None:
    args, rows = trainer.args, trainer.eval_dataset
    if rows is None:
        return None
    when = {
        IntervalStrategy.NO: "before the first step",
        IntervalStrategy.EPOCH: "every epoch",
        IntervalStrategy.STEPS: f"every {args.eval_steps or 0:g} steps",
    }[args.eval_strategy]
    return f"{sum(1 for count in rows['answer_length'] if count):,} rows, {when}"


def _peak(trainer: BlockSFTTrainer, longest: int) -> float:
    args, width = trainer.args, longest * trainer.collator.row_growth
    rows = width * args.per_device_train_batch_size
    answers = max(trainer.train_dataset["answer_length"]) * args.per_device_train_batch_size
    # At most: every row sees every other one, or there are as many masks as are kept.
    masks = min(rows * width, KEPT_CELLS) if args.attention_execution == "split" else 0
    return peak_bytes(trainer.size, rows, answers, args.gradient_checkpointing, masks)


def describe_layout(spec: LayoutSpec, block_share: float, both: bool, link_mode: str) -> str:
    """One line: modes, placement, learned tokens."""
    if not spec.block:
        return "full attention"
    words = ["block and full, each example in both" if both else f"block {block_share:.0%}"]
    words.append(spec.placement)
    if spec.num_links:
        table = f"{link_mode}, by {spec.link_table}" if spec.link_table != "slot" else link_mode
        words.append(f"{spec.num_links} links {spec.link_side} each ({table})")
    if spec.num_headers or spec.num_trailers:
        words.append(f"{spec.num_headers} headers, {spec.num_trailers} trailers")
    return ", ".join(words + (["shared prefix"] if spec.shared_prefix else []))


def describe_objective(args) -> str:
    """One line: cross-entropy, divergence, states, fresh rows."""
    how, words = args.distillation, []
    if how.weight < 1:
        words.append("cross-entropy")
    if how.weight > 0:
        words.append(f"{how.weight:.0%} KL to the teacher '{args.distill_teacher}'")
    if how.matches_states:
        words.append(f"{how.states} states x {how.states_weight:g}")
    if args.recompute != "none":
        span = f"{args.recompute_min:.0%} to {args.recompute_max:.0%}"
        words.append(f"{span} of the tokens fresh ({args.recompute})")
    return ", ".join(words)


def print_plan(plan: TrainingPlan, console: Console | None = None) -> None:
    """Prints the plan as a table."""
    share = plan.trainable / plan.parameters
    table = Table("", "", title="training plan", show_header=False, title_justify="left")
    table.add_row("base", f"{plan.base_model} ({plan.dtype})")
    table.add_row("layout", plan.layout)
    table.add_row("objective", plan.objective)
    table.add_row("attention", plan.execution)
    table.add_row("trainable", f"{plan.trainable:,} of {plan.parameters:,} ({share:.2%})")
    table.add_row("examples", f"{plan.examples:,} ({plan.dropped:,} dropped as too long)")
    packed = f"{plan.rows:,} packed rows, " if plan.rows != plan.examples else ""
    table.add_row("tokens", f"{packed}{plan.mean_tokens:,.0f} a row, longest {plan.max_tokens:,}")
    table.add_row("batch", f"{plan.global_batch} rows over {plan.world_size} process(es)")
    table.add_row("tokens per step", f"{plan.tokens_per_step:,}")
    table.add_row("steps", f"{plan.steps:,}")
    if plan.evaluation:
        table.add_row("evaluation", plan.evaluation)
    table.add_row("peak memory", f"about {amount(plan.peak_bytes)} a process, unsharded")
    table.add_row("time", f"about {duration(plan.eta_s)}; the log says what it really is")
    (console or SteadyConsole()).print(table)
