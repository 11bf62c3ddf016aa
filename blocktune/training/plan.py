"""What a run costs: operations, memory and time, estimated before it starts and measured then."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import IntervalStrategy

from blocktune.attention.masks import KEPT_CELLS
from blocktune.models.quantize import quantization_of
from blocktune.models.sharded import num_elements, whole_shape
from blocktune.prompt import LayoutSpec
from blocktune.tables import written
from blocktune.training.console import SteadyConsole, duration

ADAM_BYTES = 8
"""Two float32 moments a trainable parameter."""
HIDDEN_COPIES = 12
"""States of the model's width that a layer keeps per row for backward: norms, q, k, v, output,
residuals and their upcasts. Estimated; a kernel may keep fewer."""
FFN_COPIES = 4
"""The same of the feed-forward width: gate, up, activation, product."""
LOGIT_BYTES = 12
"""Logits, their log-softmax and its gradient in float32, per answer row and vocabulary entry."""
EFFICIENCY = 0.4
"""Share of the measured matmul rate that a training step is expected to reach."""


@dataclass(frozen=True)
class Size:
    """A model's sizes that matter to cost.

    Attributes:
        matmul: Weights that every row is multiplied with; active experts only, no output head.
        trained: Those of them that get gradients.
        layers: Decoder layers.
        hidden: Width.
        ffn: Width inside the feed-forward part.
        vocab: Vocabulary entries.
        weight_bytes: All parameters as they are stored.
        trainable: Parameters that get gradients.
        gradient_bytes: Their gradients.
        state_bytes: Of one number in an activation.
    """

    matmul: int
    trained: int
    layers: int
    hidden: int
    ffn: int
    vocab: int
    weight_bytes: int
    trainable: int
    gradient_bytes: int
    state_bytes: int


def size_of(model: nn.Module, state_bytes: int) -> Size:
    """Reads the sizes off a model that is ready to train."""
    config = model.config.get_text_config()
    head = model.get_output_embeddings()
    linear = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    # Shapes, not storage: the codes of a 4-bit weight are half a byte each.
    matmul = sum(m.in_features * m.out_features for m in linear)
    trained = sum(m.in_features * m.out_features for m in linear if m.weight.requires_grad)
    shapes = [whole_shape(p) for p in model.parameters()]
    active = getattr(config, "num_experts_per_tok", None) or 1
    matmul += sum(math.prod(shape[1:]) * active for shape in shapes if len(shape) == 3)
    learnt = [p for p in model.parameters() if p.requires_grad]
    return Size(
        matmul=matmul,
        trained=trained,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        ffn=getattr(config, "moe_intermediate_size", None) or config.intermediate_size,
        vocab=config.vocab_size,
        weight_bytes=sum(num_elements(p) * p.element_size() for p in model.parameters()),
        trainable=sum(num_elements(p) for p in learnt),
        gradient_bytes=sum(num_elements(p) * p.element_size() for p in learnt),
        state_bytes=state_bytes,
    )


def row_flops(size: Size, has_teacher: bool) -> float:
    """Operations per row of a step: forward, backward to the states, gradients of what is trained.

    Products with weights only: attention's own, the output head on answer rows and activation
    checkpointing are left out, so a utilisation from it is a lower bound.
    """
    return 4.0 * size.matmul + 2.0 * size.trained + (2.0 * size.matmul if has_teacher else 0.0)


def peak_bytes(
    size: Size, rows: float, answer_rows: int, checkpointing: bool, mask_cells: float = 0.0
) -> float:
    """Expected peak of one process without sharding: weights, gradients, Adam, states, masks.

    Args:
        size: Of the model.
        rows: Rows of the largest batch, padding included.
        answer_rows: Rows of it that get logits.
        checkpointing: Whether only each layer's input is kept, and one layer in full.
        mask_cells: Elements of attention masks that are kept.
    """
    fixed = size.weight_bytes + size.gradient_bytes + ADAM_BYTES * size.trainable
    layer = HIDDEN_COPIES * size.hidden + FFN_COPIES * size.ffn
    kept = size.layers * size.hidden + layer if checkpointing else size.layers * layer
    states = (rows * kept + mask_cells) * size.state_bytes
    return fixed + states + answer_rows * size.vocab * LOGIT_BYTES


@torch.no_grad()
def matmul_rate(device: torch.device | str, dtype: torch.dtype, seconds: float = 0.05) -> float:
    """Operations per second of plain matrix products here, the best of some.

    What a training step is compared with: no table of data sheets names every machine.
    """
    device = torch.device(device)
    side = 4096 if device.type == "cuda" else 384
    left = torch.ones(side, side, device=device, dtype=dtype)
    best, started = 0.0, time.perf_counter()
    while time.perf_counter() - started < seconds or not best:
        _wait(device)
        begin = time.perf_counter()
        left @ left
        _wait(device)
        best = max(best, 2.0 * side**3 / max(time.perf_counter() - begin, 1e-9))
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass
class Speedometer:
    """Turns counts of tokens into rates, from one log to the next.

    Attributes:
        flops_per_token: Operations of one row, see `blocktune.training.plan.row_flops`.
        rate: Operations per second of matrix products on all processes together.
    """

    flops_per_token: float
    rate: float
    _time: float = field(default=0.0, init=False)
    _tokens: float = field(default=0.0, init=False)
    _step: int = field(default=0, init=False)

    def start(self, tokens: float, step: int) -> None:
        """Starts the clock, also after a resume."""
        self._time, self._tokens, self._step = time.perf_counter(), tokens, step

    def read(self, tokens: float, step: int, last_step: int) -> dict[str, float]:
        """Rates since the last reading.

        Args:
            tokens: Rows trained on so far that are no padding, over all processes.
            step: Optimizer steps so far.
            last_step: Of the run.

        Returns:
            ``tokens_per_second``, ``mfu`` (share of the machine's matmul rate that went into
            products with weights) and ``eta_s`` (seconds that are left at this speed).
        """
        now = time.perf_counter()
        elapsed = max(now - self._time, 1e-9)
        speed = (tokens - self._tokens) / elapsed
        left = (last_step - step) * elapsed / max(step - self._step, 1)
        self._time, self._tokens, self._step = now, tokens, step
        mfu = speed * self.flops_per_token / self.rate
        return {"tokens_per_second": speed, "mfu": mfu, "eta_s": left}


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


def make_plan(trainer: Trainer) -> TrainingPlan:
    """Reads the plan off a `BlockSFTTrainer` that has not started."""
    args, info, prepared = trainer.args, trainer.files.info, trainer.prepared
    dataset = prepared.dataset
    rows = zip(dataset["length"], dataset["answer_length"], strict=True)
    lengths = [length for length, answer in rows if answer]
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


def _dtype(trainer: Trainer) -> str:
    model, args = trainer.model, trainer.args
    computed = "bfloat16" if args.bf16 else "float16" if args.fp16 else None
    held = quantization_of(model) or str(model.dtype).removeprefix("torch.")
    return held if computed in (None, held) else f"{held}, computed in {computed}"


def _evaluation(trainer: Trainer) -> str | None:
    args, rows = trainer.args, trainer.eval_dataset
    if rows is None:
        return None
    when = {
        IntervalStrategy.NO: "before the first step",
        IntervalStrategy.EPOCH: "every epoch",
        IntervalStrategy.STEPS: f"every {args.eval_steps or 0:g} steps",
    }[args.eval_strategy]
    return f"{sum(1 for count in rows['answer_length'] if count):,} rows, {when}"


def _peak(trainer: Trainer, longest: int) -> float:
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
    table.add_row("peak memory", f"about {written('bytes', plan.peak_bytes)} a process, unsharded")
    table.add_row("time", f"about {duration(plan.eta_s)}; the log says what it really is")
    (console or SteadyConsole()).print(table)
