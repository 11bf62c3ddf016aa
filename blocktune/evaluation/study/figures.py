"""Pictures of results for a page, by what they show."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from blocktune.evaluation.aggregate import pareto
from blocktune.evaluation.figure_bars import draw_bars
from blocktune.evaluation.report.charts import cost_chart
from blocktune.evaluation.report.style import Ground, as_share, legend_below, mark, to_png
from blocktune.evaluation.trace_show import draw_trace

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


FIGURES: Mapping[str, Callable[..., Path]] = {
    "bars": bars,
    "cost": cost,
    "layers": layers,
    "overlap": overlap,
    "trace": trace,
}
"""By the name that a page uses."""
