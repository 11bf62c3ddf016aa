"""Pictures of results for a page, by what they show."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from page_tables import chosen

from blocktune.evaluation.report.charts import cost_chart, draw_panels
from blocktune.evaluation.report.style import (
    Ground,
    as_share,
    label_ends,
    label_points,
    mark,
    to_png,
    whole_numbers,
    zoom,
    zoomed_start,
)
from blocktune.evaluation.stats.aggregate import pareto

Results = Mapping[str, Any]
LAYERED = {
    "beginnings": "Share of chosen tokens among a chunk's first 8",
    "accrued": "Deviation held by the top 15 % of tokens",
}
"""Shares by layer that `choice_of` measures."""
ABLATION = ("r", "s", "s+p", "psr")
"""Recompute; blanks; blanks and scaled attention; all three."""


def panels(
    results: Results,
    path: Path,
    methods: Sequence[str] | None = None,
    title: str = "Score by kind of question, with 95 % intervals",
) -> Path:
    """Methods on every kind of question, a panel for each.

    Raises:
        ValueError: If the results lack a method.
    """
    return draw_panels(chosen(results, methods), path, title)


def cost(
    results: Results, path: Path, methods: Sequence[str] | None = None, by: str = "recompute_ratio"
) -> Path:
    """Score against what is recomputed (or ``by: ttft_s``), with the Pareto front."""
    shown = chosen(results, methods)
    chart = cost_chart(shown, pareto(shown), by)
    return to_png(chart.draw, path, chart.height, width=6.5)


def layers(results: Results, path: Path, methods: Sequence[str], what: str = "beginnings") -> Path:
    """One of `LAYERED` by layer, a line a method."""

    def draw(figure: Figure, ground: Ground) -> None:
        axes, ends = figure.subplots(), {}
        for label in methods:
            own = results["methods"][label]["fidelity"]["choice"]
            look = mark(ground, label)
            axes.plot(range(1, len(own[what])), own[what][1:], clip_on=False, **look)
            ends[label] = own[what][-1], look["color"]
        if what == "beginnings":
            axes.axhline(own["first_share"], color=ground.ink, linestyle=":", linewidth=1)
            ends["by chance"] = own["first_share"], ground.ink
        whole_numbers(axes.xaxis)
        axes.set_xlabel("layer")
        axes.set_title(LAYERED[what])
        axes.set_ylim(bottom=0)
        axes.set_xlim(1, len(own[what]) - 1)
        as_share(axes.yaxis)
        label_ends(axes, ends)

    return to_png(draw, path, height=3.4, width=5.5)


def overlap(results: Results, path: Path, method: str = "naive") -> Path:
    """How many tokens chosen at one layer are chosen at another: mean over prompts."""
    shares = results["methods"][method]["fidelity"]["choice"]["overlap"]
    return draw_overlap(
        [row[1:] for row in shares[1:]], path, f"{method}: choices shared by layers"
    )


def draw_overlap(shares: Sequence[Sequence[float]], path: Path, title: str, first: int = 1) -> Path:
    """Heat map: how many tokens chosen at one layer are chosen at another.

    Args:
        shares: ``(L, L)``: of the row's choice, the share that the column's layer makes too.
        path: The picture's.
        title: Above it.
        first: Number of the first layer.
    """

    def draw(figure: Figure, ground: Ground) -> None:
        axes = figure.subplots()
        axes.grid(visible=False)
        reach = (first - 0.5, first + len(shares) - 0.5) * 2
        image = axes.imshow(shares, origin="lower", vmin=0, vmax=1, cmap="viridis", extent=reach)
        whole_numbers(axes.xaxis)
        whole_numbers(axes.yaxis)
        axes.set_xlabel("layer that is asked")
        axes.set_ylabel("layer that chose")
        axes.set_title(title)
        as_share(figure.colorbar(image, ax=axes, label="chosen by both", pad=0.02).ax.yaxis)

    return to_png(draw, path, height=4.0)


def trace(results: Results, path: Path, pattern: str) -> Path:
    """Score against storage on one trace."""
    return draw_trace(results["traces"][pattern]["cells"], path, pattern)


def draw_trace(cells: Sequence[Mapping[str, Any]], path: Path, title: str) -> Path:
    """Score against bytes stored; a larger point waits longer for its first token."""
    slowest = max(cell["ttft_s"] for cell in cells)

    def draw(figure: Figure, ground: Ground) -> None:
        axes, ends = figure.subplots(), {}
        zoom(axes, ground, zoomed_start([cell["ci95"][0] for cell in cells]), "score")
        for cell in cells:
            place, label = cell["stored_bytes"] / (1 << 20), cell["method"]
            look = mark(ground, label) | {"markersize": 3 + 8 * cell["ttft_s"] / slowest}
            reach = [[abs(cell["score"] - end)] for end in cell["ci95"]]
            axes.errorbar(place, cell["score"], yerr=reach, elinewidth=1, clip_on=False, **look)
            ends.setdefault(label, []).append((place, cell["score"]))
        for label, own in ends.items():
            axes.plot(*zip(*own, strict=True), color=mark(ground, label)["color"], lw=1, zorder=1)
        axes.set_xlabel("MiB stored")
        axes.set_title(f"Trace {title}: score against storage\n(larger: slower first token)")
        label_points(axes, ground, [(*own[-1], label) for label, own in ends.items()])

    return to_png(draw, path, 4.2, width=6.5)


def psr(results: Results, path: Path) -> Path:
    """The ablation of prefix, scale and recompute."""
    return panels(results, path, psr_methods(results), "PSR's ablation by kind of question")


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


FIGURES: Mapping[str, Callable[..., Path]] = {
    "panels": panels,
    "cost": cost,
    "layers": layers,
    "overlap": overlap,
    "trace": trace,
    "psr": psr,
}
"""By the name that a page uses."""
