"""Pictures of results for a page, by what they show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from page_tables import chosen
from states import Chosen, cumulative_of

from blocktune.evaluation.report.charts import cost_chart
from blocktune.evaluation.report.style import (
    Ground,
    as_share,
    label_ends,
    label_points,
    mark,
    to_png,
    zoom,
)
from blocktune.evaluation.results import pareto

Results = Mapping[str, Any]
LAYERED = {
    "beginnings": "Share of chosen tokens among a chunk's first 8",
    "accrued": "Deviation held by the top 15 % of tokens",
}
"""Shares by layer that `choice_of` measures."""


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
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("layer")
        axes.set_title(LAYERED[what])
        axes.set_ylim(bottom=0)
        axes.set_xlim(1, len(own[what]) - 1)
        as_share(axes.yaxis)
        label_ends(axes, ends)

    return to_png(draw, path, height=3.4, width=5.5)


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
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("layer that is asked")
        axes.set_ylabel("layer that chose")
        axes.set_title(title)
        as_share(figure.colorbar(image, ax=axes, label="chosen by both", pad=0.02).ax.yaxis)

    return to_png(draw, path, height=4.0)


def draw_trace(cells: Sequence[Mapping[str, Any]], path: Path, title: str) -> Path:
    """Score against bytes stored; a larger point waits longer for its first token."""
    slowest = max(cell["ttft_s"] for cell in cells)

    def draw(figure: Figure, ground: Ground) -> None:
        axes, ends = figure.subplots(), {}
        zoom(axes, [end for cell in cells for end in cell["ci95"]], "score")
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
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
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
