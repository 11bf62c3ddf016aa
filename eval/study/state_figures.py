"""What reuse leaves behind, on any model: which tokens deviate from full prefill, layer by layer.

    python eval/study/state_figures.py deviation --model data/tiny -i 'worlds:test?n=1' -o d.png
    python eval/study/state_figures.py cumulative --model data/tiny -i 'worlds:test?n=1' -o c.png
    python eval/study/state_figures.py overlap --model data/tiny -i 'worlds:test?n=1' -o o.png
    python eval/study/state_figures.py add --suite eval/study/suites/untuned.yaml \\
      --output out/study/untuned

The first three draw figures 3 (tokens chosen by layer), 4 (cumulative deviation) and 5 (overlap of
choices between layers) of arXiv:2603.20218. `add` measures the questions of a suite's `fidelity`
and adds the numbers by layer to the results.json of a finished run, for the tables of a page.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from page_figures import draw_overlap
from states import (
    RATIO,
    Chosen,
    Deviation,
    beginnings_of,
    by_layer,
    chosen_tokens,
    cumulative_of,
    deviation,
    overlap_of,
)

from blocktune.data import load_examples
from blocktune.engine import Engine
from blocktune.evaluation.prepare import Ready, prepare
from blocktune.evaluation.report.style import (
    Ground,
    as_share,
    label_ends,
    mark,
    to_png,
    whole_numbers,
)
from blocktune.evaluation.stats.compare import load_results
from blocktune.evaluation.stats.results import mean_of
from blocktune.evaluation.suite import changed, load_suite
from blocktune.files import replace_json
from blocktune.methods import parse_method


def draw_deviation(chosen: Chosen, path: Path, title: str) -> Path:
    """Heat map: tokens that are among the highest in at least one layer, by layer."""
    shown = np.flatnonzero(chosen.top.any(0))
    strength = chosen.deviation / chosen.deviation.max(1, keepdims=True).clip(1e-12)
    picture = np.where(chosen.top, strength, np.nan)[:, shown]
    starts = np.flatnonzero(np.diff(chosen.chunk[shown], prepend=-1))

    def draw(figure: Figure, ground: Ground) -> None:
        axes = figure.subplots()
        axes.grid(visible=False)
        image = axes.imshow(
            picture, aspect="auto", origin="lower", interpolation="nearest", cmap="viridis_r"
        )
        for start in starts:
            axes.axvline(start - 0.5, color=ground.faint, linewidth=0.6)
        whole_numbers(axes.yaxis)
        axes.set_xlabel("tokens chosen in any layer, by place; lines: chunks begin")
        axes.set_ylabel("layer")
        axes.set_title(title)
        figure.colorbar(image, ax=axes, label="deviation, of the layer's highest", pad=0.02)

    return to_png(draw, path, height=3.6, width=7.5)


def draw_cumulative(
    deviations: Mapping[str, NDArray[np.float64]], path: Path, layer: int, title: str
) -> Path:
    """Deviation accrued over tokens, the highest first, for several methods at one layer."""

    def draw(figure: Figure, ground: Ground) -> None:
        axes, ends = figure.subplots(), {}
        for label, keys in deviations.items():
            accrued = cumulative_of(keys)[layer]
            places = np.arange(1, len(accrued) + 1) / len(accrued)
            color = mark(ground, label)["color"]
            axes.plot(places, accrued, color=color)
            ends[label] = accrued[-1], color
        as_share(axes.xaxis)
        axes.set_xlim(0, 1)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("context tokens, highest deviation first")
        axes.set_ylabel("deviation of keys, accrued")
        axes.set_title(title)
        label_ends(axes, ends)

    return to_png(draw, path, height=3.6)


def draw(given: argparse.Namespace) -> Path:
    """One of the figures, of one question.

    Raises:
        ValueError: If the model or the input cannot be read, or has no such layer or question.
    """
    names = given.method or (["naive", "link0"] if given.what == "cumulative" else ["naive"])
    found = measured(given, names)
    if given.what == "cumulative":
        keys = {name: chosen_tokens(away, 1.0).deviation for name, away in found.items()}
        layers = min(map(len, keys.values()))
        if not 0 <= given.layer < layers:
            raise ValueError(f"--layer must be below the model's {layers}, got {given.layer}")
        return draw_cumulative(keys, given.output, given.layer, f"Layer {given.layer}")
    chosen = chosen_tokens(found[names[0]], given.ratio)
    title = f"{names[0]}: highest {given.ratio:.0%}"
    if given.what == "overlap":
        return draw_overlap(overlap_of(chosen), given.output, f"{title} of tokens", first=0)
    shares = ", ".join(f"{share:.0%}" for share in beginnings_of(chosen))
    print(f"of them first tokens of a chunk, by layer: {shares}")
    return draw_deviation(chosen, given.output, f"{title} by layer")


def measured(given: argparse.Namespace, names: list[str]) -> dict[str, Deviation]:
    """Each method's deviation from full prefill on one question."""
    built = {name: parse_method(name) for name in names}
    engine = Engine.from_pretrained(
        given.model, given.adapter, dtype=given.dtype, device=given.device
    )
    examples = load_examples(given.input, limit=given.index + 1, tokenizer=engine.tokenizer)
    if len(examples) <= given.index:
        raise ValueError(f"'{given.input}' has {len(examples)} questions, no --index {given.index}")
    oracle, example = parse_method("full-prefill"), examples[given.index]
    return {name: deviation(engine, example, m, oracle) for name, m in built.items()}


def add_states(ready: Ready, results: Mapping[str, Any]) -> dict[str, Any]:
    """Finished results with the numbers by layer in each method's ``fidelity``, means over prompts.

    Args:
        ready: The suite that was run, loaded.
        results: What its ``results.json`` holds.
    """
    suite, found = ready.suite, {}
    for spec in ready.suite.methods:
        method = ready.methods[spec.label]
        found[spec.label] = mean_of(
            [
                by_layer(ready.engine(spec, task), example, method)
                for task in suite.tasks
                for example in ready.of(task, suite.fidelity.num)
            ]
        )
    methods = dict(results["methods"])
    for label, summary in methods.items():
        own = mean_of([found[one] for one in suite.pool.get(label, [label])])
        methods[label] = summary | {"fidelity": (summary["fidelity"] or {}) | own}
    return {**results, "methods": methods}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="what", required=True)
    for name in ("deviation", "cumulative", "overlap"):
        command = commands.add_parser(name)
        command.add_argument("--model", required=True, help="folder or name on the Hub")
        command.add_argument("--input", "-i", required=True, help="questions, as `load_examples`")
        command.add_argument("--output", "-o", type=Path, required=True, help="the PNG")
        command.add_argument("--index", type=int, default=0, help="which question, from 0")
        command.add_argument("--method", action="append", help="reuse to draw; repeatable")
        command.add_argument("--ratio", type=float, default=RATIO, help="share that counts as high")
        command.add_argument("--layer", type=int, default=1, help="of `cumulative`, from 0")
        command.add_argument("--adapter")
        command.add_argument("--dtype", default="auto")
        command.add_argument("--device")
    command = commands.add_parser("add")
    command.add_argument("--suite", type=Path, required=True, help="the suite that was run")
    command.add_argument("--output", type=Path, required=True, help="folder of the finished run")
    command.add_argument("--limit", type=int, help="as it was run")
    command.add_argument("--model", help="as it was run")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    given = parse(arguments)
    try:
        if given.what == "add":
            results = load_results(given.output)
            ready = prepare(changed(load_suite(given.suite), given.limit, given.model))
            replace_json(given.output / "results.json", add_states(ready, results))
            print(given.output / "results.json")
        else:
            print(draw(given))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
