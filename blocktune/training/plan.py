"""The output of a run: its options, its plan with expected memory and time, and its log lines."""

from __future__ import annotations

import math
import re
import time
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import nn
from transformers import Trainer, TrainerCallback
from trl import ModelConfig

from blocktune.adapter.scope import SCOPED_ROWS
from blocktune.attention.kernels import FEW_SCORES
from blocktune.attention.masks import KEPT_CELLS
from blocktune.models.quantize import quantization_of
from blocktune.models.sharded import whole_shape
from blocktune.models.small import config_value
from blocktune.prompt import LayoutSpec
from blocktune.tables import Table, written
from blocktune.training import config as options
from blocktune.training.launch_checks import say

ADAM_BYTES = 8  # two float32 moments per trainable parameter
# Tensors that a layer keeps for backward, an estimate: of the model's width (norms, q, k, v,
# output, residuals, their upcasts), and of the feed-forward width (gate, up, activation, product).
HIDDEN_COPIES, FFN_COPIES = 12, 4
NORMS = 2  # of a layer; their inputs are kept in float32, too, if the layer computes in less
LOGIT_BYTES = 12  # per answer row and vocabulary entry: logits, log-softmax, gradient in float32
SCORE_BYTES = 6  # per attention score that is kept on a CPU: its weight in float32 and bfloat16
EFFICIENCY = 0.4  # share of the measured matmul rate that a training step is expected to reach


class Size(NamedTuple):
    """The sizes of a model that determine memory and time."""

    config: Any  # of the decoder, for its widths
    matmul: int  # weights that each row is multiplied by: active experts only, no output head
    trained: int  # number of those that get gradients
    parameters: int  # number of all parameters
    trainable: int  # number of those that get gradients
    fixed_bytes: int  # parameters as stored, gradients and Adam's moments
    state_bytes: int  # bytes per number in an activation


def size_of(model: nn.Module, state_bytes: int) -> Size:
    """Measures a model that is ready to train."""
    config = model.config.get_text_config()
    head = model.get_output_embeddings()
    linear = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    # By shape, not by storage: a 4-bit weight is stored in half a byte.
    sizes = [(m.in_features * m.out_features, m.weight.requires_grad) for m in linear]
    matmul, trained = sum(n for n, _ in sizes), sum(n for n, is_trained in sizes if is_trained)
    weights = [(p, math.prod(whole_shape(p))) for p in model.parameters()]
    experts = [shape for p, _ in weights if len(shape := whole_shape(p)) == 3]
    active = getattr(config, "num_experts_per_tok", None) or 1
    matmul += active * sum(math.prod(shape[1:]) for shape in experts)
    fixed = sum(n * p.element_size() for p, n in weights)
    fixed += sum(n * (p.element_size() + ADAM_BYTES) for p, n in weights if p.requires_grad)
    parameters = sum(n for _, n in weights)
    trainable = sum(n for p, n in weights if p.requires_grad)
    return Size(config, matmul, trained, parameters, trainable, fixed, state_bytes)


def row_flops(size: Size, has_teacher: bool) -> float:
    """FLOPs per row of a step (forward, inputs' and weights' gradients) in products with weights.

    Attention, output head and checkpointing are left out: utilisation from it is a lower bound.
    """
    return 4.0 * size.matmul + 2.0 * size.trained + (2.0 * size.matmul if has_teacher else 0.0)


def peak_bytes(
    size: Size,
    rows: float,
    logits: float,
    checkpointing: bool,
    mask_cells: float = 0.0,
    scores: float = 0.0,
) -> float:
    """Expected peak memory of an unsharded process: weights, gradients, Adam, activations, masks.

    ``rows`` are those of the largest batch with padding, ``logits`` bytes per vocabulary entry,
    ``scores`` what a layer keeps. ``checkpointing`` keeps one layer, and the inputs of all.
    """
    config, layers = size.config, size.config.num_hidden_layers
    ffn = config_value(config, "moe_intermediate_size", "intermediate_size")
    ffn = max(ffn) if isinstance(ffn, list) else ffn or 4 * config.hidden_size
    row = (HIDDEN_COPIES * config.hidden_size + FFN_COPIES * ffn) * size.state_bytes
    if size.state_bytes < 4:
        row += NORMS * config.hidden_size * 4
    layer = rows * row + scores * SCORE_BYTES
    inputs = rows * layers * config.hidden_size * size.state_bytes
    kept = inputs + layer if checkpointing else layers * layer
    masks = mask_cells * size.state_bytes
    return size.fixed_bytes + kept + masks + logits * config.vocab_size


@torch.no_grad()
def matmul_rate(device: torch.device | str, dtype: torch.dtype, seconds: float = 0.05) -> float:
    """FLOPs per second of plain matrix products on this device, the best of several runs."""
    device = torch.device(device)
    on_gpu = device.type == "cuda"
    wait, side = (torch.cuda.synchronize, 4096) if on_gpu else (torch.cpu.synchronize, 384)
    left = torch.ones(side, side, device=device, dtype=dtype)
    best, started = 0.0, time.perf_counter()
    while time.perf_counter() - started < seconds or not best:
        wait(device)
        begin = time.perf_counter()
        left @ left
        wait(device)
        best = max(best, 2.0 * side**3 / max(time.perf_counter() - begin, 1e-9))
    return best


@dataclass
class Speedometer:
    """Computes speeds from the number of tokens since the last log."""

    flops_per_token: float  # see `row_flops`
    rate: float  # FLOPs per second of matrix products, all processes together
    _last: tuple[float, float, int] = field(default=(0.0, 0.0, 0), init=False)

    def start(self, tokens: float, step: int) -> None:
        """Starts the clock."""
        self._last = time.perf_counter(), tokens, step

    def read(self, tokens: float, step: int, last_step: int) -> dict[str, float]:
        """``tokens_per_second`` since the last reading, ``eta_s`` (time left) and ``mfu``.

        ``tokens`` so far are of all processes, without padding. ``mfu``, the share of the matmul
        rate, is omitted above 1: the rate was then measured while the machine was busy.
        """
        then, old_tokens, old_step = self._last
        self.start(tokens, step)
        elapsed = max(self._last[0] - then, 1e-9)
        speed = (tokens - old_tokens) / elapsed
        left = (last_step - step) * elapsed / max(step - old_step, 1)
        mfu = speed * self.flops_per_token / self.rate
        return {"tokens_per_second": speed, "eta_s": left} | ({"mfu": mfu} if mfu <= 1 else {})


def make_plan(trainer: Trainer) -> dict[str, str]:
    """Describes what a `BlockSFTTrainer` is about to do: texts by the name of a property.

    Peak memory is without sharding, time at `EFFICIENCY` of the measured matmul rate.
    """
    args, info, prepared = trainer.args, trainer.files.info, trainer.prepared
    size, examples, limit = trainer.size, prepared.num_examples, trainer.exact_tokens
    rows = zip(prepared.dataset["length"], prepared.dataset["answer_length"], strict=True)
    lengths = [length for length, answer in rows if answer]
    mean, held_out = sum(lengths) / len(lengths), trainer.eval_dataset
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    per_epoch = math.ceil(len(lengths) / batch)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch)
    flops = trainer.speed.flops_per_token * mean * batch * steps * trainer.collator.row_growth
    packed = f"{len(lengths):,} packed rows, " if len(lengths) != examples else ""
    trained = f"{size.trainable:,} of {size.parameters:,} ({size.trainable / size.parameters:.2%})"
    if args.scope in SCOPED_ROWS:
        trained += f", on {SCOPED_ROWS[args.scope]} only"
    peak = written("bytes", expected_peak(trainer))
    dtype = quantization_of(trainer.model) or str(trainer.model.dtype).removeprefix("torch.")
    has_gpu = torch.accelerator.is_available()
    time_s = duration(flops / (EFFICIENCY * trainer.speed.rate))
    plan = {
        "base": f"{info.base_model} ({dtype}{', bf16' * args.bf16}{', fp16' * args.fp16})",
        "layout": describe_layout(args, prepared.num_block / examples),
        "objective": describe_objective(args),
        "attention": args.attention_execution,
        "trainable": trained,
        "examples": f"{examples:,} ({prepared.num_dropped:,} dropped as too long)",
        "tokens": f"{packed}{mean:,.0f} per row, longest {max(lengths):,}",
        "exact up to": limit and f"{limit:,} tokens; longer examples: {args.long_examples}",
        "device": args.device.type if has_gpu else "cpu (use_cpu, since no GPU was found)",
        "batch": f"{batch} rows over {args.world_size} process(es)",
        "tokens per step": f"{round(mean * batch):,}",
        "steps": f"{steps:,}",
        "evaluation": held_out and f"{sum(map(bool, held_out['answer_length'])):,} rows",
        "peak memory": f"about {peak} per process, unsharded",
        "time": f"about {time_s}; the log shows the measured time",
    }
    return {name: text for name, text in plan.items() if text}


def expected_peak(trainer: Trainer) -> float:
    """`peak_bytes` for the largest possible batch of a trainer."""
    args, data, size = trainer.args, trainer.train_dataset, trainer.size
    batch, lengths = args.per_device_train_batch_size, data["length"]
    growth = trainer.collator.row_growth
    width = max(lengths) * growth
    answers = batch * max(data["answer_length"])
    losses = 1 if trainer.objective.teacher is None else 2
    # The model computes logits where any row of the batch has an answer; they get a gradient.
    logits = losses * answers * LOGIT_BYTES + 2 * size.state_bytes * batch * min(answers, width)
    # Upper bound: a mask of all rows by all rows, or the limit of the mask cache.
    masks = min(batch * width**2, KEPT_CELLS) if args.attention_execution == "split" else 0
    scores = 0.0
    if args.device.type == "cpu" and size.state_bytes == 2:  # see `kernels.FEW_SCORES`
        heads, parts = size.config.num_attention_heads, data[lengths.index(max(lengths))]["parts"]
        scores = batch * growth * sum(_scores(part, heads) for part in parts)
    return peak_bytes(size, batch * width, logits, args.gradient_checkpointing, masks, scores)


def _scores(part: dict[str, Any], heads: int) -> float:
    """Attention scores of an example: prefix and chunks by themselves, other rows over all."""
    length = part["length"]
    own = [len(piece) for piece in (part["prefix"], *part["chunks"])] if part["block"] else [length]
    cells = [*(count**2 for count in own), (length - sum(own)) * length]
    return sum(heads * count for count in cells if heads * count <= FEW_SCORES)


def describe_layout(args, block_share: float) -> str:
    """A line with the modes and what differs from plain blocks; ``block_share`` is the actual."""
    if not args.layout.block:
        return "full attention"
    share = (
        "block and full, each example in both" if args.both_modes else f"block {block_share:.0%}"
    )
    plain, own = asdict(LayoutSpec()), asdict(args.layout)
    return ", ".join([share, *(f"{key} {own[key]}" for key in own if own[key] != plain[key])])


def describe_objective(args) -> str:
    """A line with the parts of the loss: cross-entropy, divergence, states, fresh rows."""
    words = ["cross-entropy"] if args.distill_weight < 1 else []
    if args.distill_weight > 0:
        words.append(f"{args.distill_weight:.0%} KL to the teacher '{args.distill_teacher}'")
    if args.matches_states:
        words.append(f"{args.distill_states} states x {args.distill_states_weight:g}")
    if args.recompute != "none":
        span = f"{args.recompute_min:.0%} to {args.recompute_max:.0%}"
        words.append(f"{span} of the tokens fresh ({args.recompute})")
    return ", ".join(words)


def print_options(console: Console | None = None) -> None:
    """Prints a table for each group of keys, with defaults and descriptions."""
    groups = {
        "Data and wording": options.DataArgs.__annotations__,
        "Layout": options.LayoutOptions.__annotations__,
        "Objective": options.ObjectiveOptions.__annotations__,
        "Batches": options.BatchOptions.__annotations__,
        "The run": options.BlockSFTConfig.__annotations__,
        "Model, LoRA and quantization, by TRL": ModelConfig.__annotations__,
        "Training, by TRL and transformers": [f.name for f in fields(options.BlockSFTConfig)],
    }
    holders = (options.DataArgs, options.BlockSFTConfig, ModelConfig)
    headings = ("key", "default", "meaning")
    remaining = {key.name: key for holder in holders for key in fields(holder) if key.init}
    choices = options.choices(options.DataArgs) | options.choices(options.BlockSFTConfig)
    for title, names in groups.items():
        rows = []
        for key in [remaining.pop(name) for name in names if name in remaining]:
            value = key.default if key.default_factory is MISSING else key.default_factory()
            shown = repr(value) if isinstance(value, str) else str(getattr(value, "value", value))
            # Only the first sentence, since descriptions of transformers have several paragraphs.
            text = " ".join(str(key.metadata.get("help", "")).split())
            meaning = re.split(r"(?<=\w\w\w)\.\s", text, maxsplit=1)[0].removesuffix(".")
            values = f" ({', '.join(choices[key.name])})" if key.name in choices else ""
            rows.append((key.name, shown, meaning + values))
        Table(headings, rows, title, left=headings).show(console)


def duration(seconds: float) -> str:
    """A duration as text in seconds, minutes or hours."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class LogLines(TrainerCallback):
    """Prints a line per log: step, loss, accuracy, learning rate, speed, and time left."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Prints the line."""
        if not state.is_world_process_zero or not logs:
            return
        if "loss" in logs:
            words = [
                f"step {state.global_step:>5}/{state.max_steps}",
                f"loss {float(logs['loss']):.4f}",
                *([f"KL {float(logs['divergence']):.4f}"] if "divergence" in logs else []),
                f"accuracy {float(logs.get('mean_token_accuracy', 0)):.3f}",
                f"lr {float(logs['learning_rate']):.2e}",
                f"{logs['tokens_per_second']:,.0f} tokens/s",
                *([f"MFU {logs['mfu']:.0%}"] if "mfu" in logs else []),
                f"{duration(logs['eta_s'])} left",
            ]
            say("  ".join(words))
        elif "eval_loss" in logs:
            say(f"evaluation loss {logs['eval_loss']:.4f}")
        elif "train_runtime" in logs:
            say(f"trained in {logs['train_runtime']:.1f} s")


def print_plan(plan: dict[str, str]) -> None:
    """Prints the plan, a line for each property."""
    say("\n".join(["training plan", *(f"  {name:15}  {text}" for name, text in plan.items())]))
