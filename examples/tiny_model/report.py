"""Measures the included model, and writes its numbers, learning curves and README."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM, AutoTokenizer

from blocktune.data.worlds import QUESTION_KINDS, WorldConfig, generate_examples
from blocktune.evaluation.report.style import (
    COLOURS,
    Ground,
    label_ends,
    to_png,
    zoom,
)
from blocktune.provenance import provenance
from examples.tiny_model.config import PretrainConfig, Stage
from examples.tiny_model.measure import SETTINGS, by_kind, chance, correct

COMMAND = "python -m examples.tiny_model.pretrain --output data/tiny"


def write_report(folder: Path, num_examples: int, device: str = "cpu") -> None:
    """Measures the saved model in ``folder``; writes ``numbers.json``, a plot and a README.

    Args:
        folder: Output folder of `pretrain`.
        num_examples: Number of test questions of each kind, over contexts of 10 chunks.
        device: Device on which the model was trained, and is measured.
    """
    torch.set_num_threads(os.cpu_count() or 1)
    started = time.perf_counter()
    numbers = final_numbers(folder, num_examples, device)
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    head, *log = map(json.loads, lines)
    numbers["training_minutes"] = round(log[-1]["seconds"] / 60, 1)
    numbers["evaluation_minutes"] = round((time.perf_counter() - started) / 60, 1)
    numbers["config"] = head["config"]
    numbers["trained"] = {"command": head["command"], "commit": head["commit"]}
    taken = taken_steps(head["config"], log)
    numbers["steps"] = taken[-1]
    numbers["provenance"] = provenance() | {"hardware": hardware(device)}
    (folder / "numbers.json").write_text(json.dumps(numbers, indent=1) + "\n")
    draw_curves(log, taken, folder / "curves.png")
    (folder / "README.md").write_text(readme(numbers, log))


def taken_steps(config: dict[str, Any], log: list[dict]) -> list[int]:
    """Number of steps taken at each line of the log."""
    stages = tuple(Stage(**stage) for stage in config["stages"])
    return PretrainConfig(stages=stages).taken([entry["step"] for entry in log])


def final_numbers(folder: Path, num_examples: int, device: str) -> dict[str, Any]:
    """Exact match of greedy decoding by setting and kind, from the saved weights in float32.

    ``em`` is on default test worlds. ``other`` is with full attention and naive reuse on worlds
    with as few aliases as in pre-training, and on crowded worlds.
    """
    torch.set_float32_matmul_precision("highest")  # since training on a GPU lowers it
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().to(device)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tables: dict[str, Any] = {setting: {} for setting in SETTINGS}
    chances = {}
    for kind in QUESTION_KINDS:
        worlds = WorldConfig("test", seed=1, num_examples=num_examples, kinds={kind: 1.0})
        examples = list(generate_examples(worlds))
        for setting in SETTINGS:
            if setting == "bridge-deleted" and kind not in ("2-hop", "3-hop"):
                continue
            correct_answers = correct(model, tokenizer, examples, setting)
            tables[setting] |= by_kind(examples, correct_answers)
        chances[kind] = round(chance(examples), 4)
    aliased = json.loads((folder / "log.jsonl").read_text().splitlines()[0])["config"]["aliased"]
    other: dict[str, Any] = {}
    few = f"aliased={aliased}", {"aliased": aliased}
    for name, options in (few, ("crowded=1", {"crowded": True})):
        kinds = {"cross-chunk": 1.0, "2-hop": 1.0}
        worlds = WorldConfig("test", seed=1, num_examples=2 * num_examples, kinds=kinds, **options)
        examples = list(generate_examples(worlds))
        for setting in ("full", "naive"):
            correct_answers = correct(model, tokenizer, examples, setting)
            other.setdefault(name, {})[setting] = by_kind(examples, correct_answers)
    return {
        "parameters": model.num_parameters(),
        "em": tables,
        "other": other,
        "answer_elsewhere": chances,
    }


def hardware(device: str) -> str:
    """The GPU, or CPU cores and relevant instruction sets; no names of machines."""
    if device == "cuda":
        return f"one {torch.cuda.get_device_name()} and {os.cpu_count()} CPU cores"
    try:
        flags = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        flags = []
    sets = [name for name in ("avx2", "avx512f", "avx512_bf16") if name in flags]
    return f"{os.cpu_count()} CPU cores ({', '.join(sets) or 'unknown'}), no GPU, shared machine"


def draw_curves(log: list[dict], steps: list[int], path: Path) -> None:
    """Draws loss and exact match on dev worlds over the number of steps taken."""
    measured = [(step, e["dev"]) for step, e in zip(steps, log, strict=True) if "dev" in e]
    kinds = dict(
        zip(("self-contained", "cross-chunk", "2-hop"), ("blue", "red", "green"), strict=True)
    )
    lines = {
        f"{kind}, {setting}": [dev[setting].get(kind, {}).get("em") for _, dev in measured]
        for kind in kinds
        for setting in ("full", "naive")
    }

    def draw(figure: Figure, ground: Ground) -> None:
        left, right = figure.subplots(1, 2)
        colours, ends = dict(zip(COLOURS, ground.series, strict=True)), {}
        for name, key, colour in (("loss", "loss", "ink"), ("accuracy", "answer_accuracy", "sky")):
            values = [entry[key] for entry in log]
            left.plot(steps, values, color=colours[colour])
            ends[name] = values[-1], colours[colour]
        left.set(xlabel="step", title="Training: loss, and accuracy of answers", ylim=(0, 2.5))
        label_ends(left, ends)
        scores = [value for values in lines.values() for value in values if value is not None]
        zoom(right, scores, "exact match")
        for name, values in lines.items():
            colour = colours[kinds[name.partition(",")[0]]]
            style = "-" if name.endswith("full") else ":"
            right.plot([step for step, _ in measured], values, style, color=colour)
        right.set(xlabel="step", title="10 dev chunks, full attention and naive reuse")
        last = {name: values[-1] for name, values in lines.items() if values[-1] is not None}
        label_ends(right, {n: (v, colours[kinds[n.partition(",")[0]]]) for n, v in last.items()})

    to_png(draw, path, height=4, width=12)


def readme(numbers: dict[str, Any], log: list[dict]) -> str:
    """The model card."""
    em, origin, shape = numbers["em"], numbers["provenance"], numbers["config"]
    command = COMMAND + (" --device cuda" if shape["device"] == "cuda" else "")
    rows = [
        f"| {kind} | {cell['n']} | "
        + " | ".join(f"{em[s][kind]['em']:.3f}" if kind in em[s] else "" for s in SETTINGS)
        + " |"
        for kind, cell in em["full"].items()
    ]
    return f"""# The tiny model

A Llama-style decoder with {numbers["parameters"]:,} parameters ({shape["layers"]} layers of width
{shape["width"]}, {shape["heads"]} query and {shape["kv_heads"]} key-value heads, tied embeddings,
RoPE), trained from scratch in full causal attention on generated English worlds
(`blocktune/data/worlds`). It answers questions over ten short passages and knows nothing else. Its
purpose is to make the cost of reusing cached chunks measurable.

Made by `{command}` at commit `{numbers["trained"]["commit"]}`:
{numbers["steps"]} steps, {log[-1]["tokens"] / 1e6:.1f} M tokens,
{numbers["training_minutes"]} minutes on {origin["hardware"]};
measured at commit `{origin["commit"]}` in {numbers["evaluation_minutes"]} minutes. The same command
with `--go-on` measures again.
Weights are saved in bfloat16; the numbers are of the saved weights, computed in float32.

## Targets

| target on test worlds of 10 chunks | measured | met |
|---|---|---|
{chr(10).join(_targets(em))}

## Exact match

Greedy decoding. If the output contains `Answer:`, the text after the last one is scored. Test
worlds have exactly 10 chunks and share no name with training. *full*: full attention. *naive*:
every chunk encoded alone, no tuning. *no-context*: no chunks. *bridge-deleted*: without the chunk
that states the last hop's fact.

| kind | n | full | naive | no-context | bridge-deleted |
|---|---|---|---|---|---|
{chr(10).join(rows)}

After the bridge is deleted, the answer still occurs elsewhere in the context for
{numbers["answer_elsewhere"]["2-hop"]:.1%} of the 2-hop questions: an upper bound on guessing
from the context.

Cross-chunk questions ask for a fact in a chunk that does not name its subject. In these worlds at
most one document of each kind continues in such chunks, half of them by an alias; pre-training had
an alias in {shape["aliased"]:.0%} of them. On other worlds with the same test names:

| worlds | full | naive |
|---|---|---|
{chr(10).join(_elsewhere(numbers["other"]))}

Files: `model.safetensors`, `config.json`, tokenizer and chat template; `log.jsonl` and
`curves.png` (training), `numbers.json` (the table with its provenance).

![curves](curves.png)
"""


def _targets(em: dict[str, dict]) -> Iterator[str]:
    """Yields a table row for each target: the measured value, and whether it is met."""
    full, naive = em["full"], em["naive"]
    for kind, target in (("self-contained", 0.9), ("2-hop", 0.75), ("cross-chunk", 0.9)):
        value = full[kind]["em"]
        yield f"| {kind}, full: at least {target} | {value:.3f} | {_yes(value >= target)} |"
    gap = max(full[k]["em"] - naive[k]["em"] for k in ("cross-chunk", "2-hop"))
    met = _yes(gap >= 0.25)
    yield f"| full over naive, cross-chunk or 2-hop: at least 0.25 | {gap:.3f} | {met} |"
    none = max(em["no-context"][k]["em"] for k in ("self-contained", "cross-chunk", "2-hop"))
    yield f"| no context: at most 0.05 | {none:.3f} | {_yes(none <= 0.05)} |"


def _elsewhere(other: dict[str, dict]) -> Iterator[str]:
    """Yields table rows for full attention and naive reuse on other worlds."""
    for name, em in other.items():
        for kind in ("cross-chunk", "2-hop"):
            full, naive = em["full"][kind]["em"], em["naive"][kind]["em"]
            yield f"| `{name}`, {kind} | {full:.3f} | {naive:.3f} |"


def _yes(met: bool) -> str:
    return "yes" if met else "**no**"
