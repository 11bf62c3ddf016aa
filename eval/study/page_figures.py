"""Pictures of results for a page, by what they show."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from blocktune.evaluation.aggregate import pareto
from blocktune.evaluation.report.charts import cost_chart
from blocktune.evaluation.report.style import Ground, as_share, legend_below, mark, to_png

Results = Mapping[str, Any]
LAYERED = {
    "beginnings": "of the choice, first 8 tokens of a chunk",
    "accrued": "deviation in the top 15 % of tokens",
}
"""Shares by layer that `choice_of` measures."""


def bars(results: Results, path: Path, methods: Sequence[str] | None = None) -> Path:
    """Methods side by side on every kind of question."""
    return draw_bars(results, path, methods=methods)


def cost(
    results: Results, path: Path, methods: Sequence[str] | None = None, by: str = "recompute_ratio"
) -> Path:
    """Score against what is recomputed (or ``by: ttft_s``), with the Pareto front."""
    shown = {label: results["methods"][label] for label in methods or results["methods"]}
    budget = {"pareto": pareto(shown)}
    chart = cost_chart({"methods": shown, "budget": budget}, by, -(-len(shown) // 2) * 0.19)
    return to_png(chart.draw, path, chart.height)


def layers(results: Results, path: Path, methods: Sequence[str], what: str = "beginnings") -> Path:
    """One of `LAYERED` by layer, a line a method."""

    def draw(figure: Figure, ground: Ground) -> None:
        axes = figure.subplots()
        for index, label in enumerate(methods):
            own = results["methods"][label]["fidelity"]["choice"]
            numbers = range(1, len(own[what]))
            axes.plot(numbers, own[what][1:], label=label, **mark(ground, index + 2))
        if what == "beginnings":
            axes.axhline(own["first_share"], color=ground.ink, linestyle=":", linewidth=1)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("layer")
        axes.set_ylabel(LAYERED[what])
        axes.set_ylim(bottom=0)
        as_share(axes.yaxis)
        legend_below(figure, axes)

    return to_png(draw, path, height=3.6)


def overlap(results: Results, path: Path, method: str = "naive") -> Path:
    """How many tokens chosen at one layer are chosen at another: mean over prompts."""
    shares = results["methods"][method]["fidelity"]["choice"]["overlap"]

    def draw(figure: Figure, ground: Ground) -> None:
        axes = figure.subplots()
        axes.grid(visible=False)
        inner = [row[1:] for row in shares[1:]]
        reach = (0.5, len(inner) + 0.5) * 2
        image = axes.imshow(inner, origin="lower", vmin=0, vmax=1, cmap="viridis", extent=reach)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("layer that is asked")
        axes.set_ylabel("layer that chose")
        bar = figure.colorbar(image, ax=axes, label="chosen by both", pad=0.02)
        as_share(bar.ax.yaxis)

    return to_png(draw, path, height=4.0)


def trace(results: Results, path: Path, pattern: str) -> Path:
    """Score against storage on one trace."""
    return draw_trace(results["traces"][pattern]["cells"], path, pattern)


def psr(results: Results, path: Path) -> Path:
    """The ablation of prefix, scale and recompute."""
    return draw_bars(results, path, methods=psr_methods(results), title="PSR's ablation")


FIGURES: Mapping[str, Callable[..., Path]] = {
    "bars": bars,
    "cost": cost,
    "layers": layers,
    "overlap": overlap,
    "trace": trace,
    "psr": psr,
}
"""By the name that a page uses."""


ABLATION = ("r", "s", "s+p", "psr")
"""Recompute; blanks; blanks and scaled attention; all three."""
_SWATCH, _LETTER = 0.5, 0.073
"""Inches that a legend's entry takes: its patch, and each letter."""
SCORES = ("score", "em", "f1", "substring_em", "adjusted_f1")


def draw_bars(
    results: Mapping[str, Any],
    path: Path,
    *,
    score: str = "score",
    methods: Sequence[str] | None = None,
    title: str = "",
) -> Path:
    """Draws one group of bars a task, one bar a method, with 95 % intervals where there are any.

    Args:
        results: What ``results.json`` holds.
        path: The picture's.
        score: One of `SCORES`.
        methods: Labels, in order; None takes all.
        title: Above it.

    Raises:
        ValueError: If the score or a label is not in the results.
    """
    if score not in SCORES:
        raise ValueError(f"unknown score '{score}'; available: {', '.join(SCORES)}")
    shown = list(methods or results["methods"])
    if missing := [label for label in shown if label not in results["methods"]]:
        known = ", ".join(results["methods"])
        raise ValueError(f"no method '{missing[0]}' in these results; they have: {known}")
    groups = list(results["methods"][shown[0]]["tasks"])
    step = 0.8 / len(shown)

    def draw(figure: Figure, ground: Ground) -> None:
        axes = figure.subplots()
        for index, label in enumerate(shown):
            cells = [results["methods"][label]["tasks"][group] for group in groups]
            places = [g + (index - (len(shown) - 1) / 2) * step for g in range(len(groups))]
            heights = [cell[score] or 0.0 for cell in cells]
            axes.bar(
                places,
                heights,
                width=0.92 * step,
                label=label,
                color=ground.series[index % len(ground.series)],
                hatch="///" * (index // len(ground.series)),
                edgecolor="#7f7f7f" if index >= len(ground.series) else None,
                yerr=_reach(cells, score),
                error_kw={"ecolor": "#7f7f7f", "elinewidth": 1.4},
            )
        axes.set_xticks(range(len(groups)), [group.replace("/", "/\n") for group in groups])
        axes.tick_params(axis="x", length=0)
        axes.grid(axis="x", visible=False)
        axes.set_ylabel(score)
        axes.set_title(title)
        as_share(axes.yaxis)
        legend_below(figure, axes, columns)

    width = min(max(4.6, 1.1 + 0.16 * len(shown) * len(groups)), 14)
    columns = min(4, max(1, int(width / (_SWATCH + _LETTER * max(map(len, shown))))))
    return to_png(draw, path, height=3.6 + 0.1 * len(shown), width=width)


def psr_methods(results: Mapping[str, Any]) -> list[str]:
    """Labels of the ablation of prefix, scale and recompute, with the two baselines.

    Raises:
        ValueError: If the results lack one of them.
    """
    found = {}
    for label, summary in results["methods"].items():
        if summary["adapter"] is None:
            found.setdefault(summary["method"], label)
    if missing := [name for name in ABLATION if name not in found]:
        raise ValueError(
            f"the ablation needs the methods {', '.join(ABLATION)}, these results lack "
            f"'{missing[0]}'; run eval/suites/psr.yaml"
        )
    return [found[name] for name in ("naive", *ABLATION, "full-prefill") if name in found]


def _reach(cells: Sequence[Mapping[str, Any]], score: str) -> list[list[float]] | None:
    key = {"score": "score_ci95", "em": "ci95", "f1": "f1_ci95"}.get(score)
    if key is None:
        return None
    low = [max(0.0, cell[score] - cell[key][0]) for cell in cells]
    return [low, [max(0.0, cell[key][1] - cell[score]) for cell in cells]]


def draw_trace(cells: Sequence[Mapping[str, Any]], path: Path, title: str) -> Path:
    """Score against bytes stored; a larger point waits longer for its first token."""
    slowest = max(cell["ttft_s"] for cell in cells)
    labels = list(dict.fromkeys(cell["method"] for cell in cells))

    def draw(figure: Figure, ground: Ground) -> None:
        axes = figure.subplots()
        for index, label in enumerate(labels):
            own = [cell for cell in cells if cell["method"] == label]
            style = mark(ground, index)
            places = [cell["stored_bytes"] / (1 << 20) for cell in own]
            heights = [cell["score"] for cell in own]
            sizes = [20 + 130 * cell["ttft_s"] / slowest for cell in own]
            axes.plot(places, heights, color=style["color"], linewidth=1, zorder=1)
            axes.scatter(places, heights, s=sizes, label=label, zorder=2, clip_on=False, **style)
        axes.set_xlabel("MiB stored")
        axes.set_ylabel("score")
        as_share(axes.yaxis)
        axes.set_title(f"{title} (larger: slower first token)")
        legend_below(figure, axes)

    return to_png(draw, path, 3.2 + 0.19 * -(-len(labels) // 2))
