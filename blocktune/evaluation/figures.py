"""The results as a picture: accuracy by kind, and accuracy against what it costs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from blocktune.files import replacing

# Okabe and Ito's palette, told apart by all common forms of colour vision; markers say it again.
COLOURS = ("#000000", "#999999", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("s", "x", "v", "o", "D", "^", "P", "X", "h")  # one more: pairs repeat after 72
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "figure.dpi": 150,
    "figure.constrained_layout.h_pad": 0.08,
}


def draw_results(results: Mapping[str, Any], path: str | Path, title: str = "") -> Path:
    """Draws `build_results` to a PNG (or what the suffix says), whole or not at all.

    Left: the headline score by kind with 95 % intervals. Right: it against time to first token
    as a share of full prefill's or, where that was not measured, the recomputed share.

    Returns:
        The path.
    """
    with mpl.rc_context(STYLE), replacing(path) as temporary:
        figure = Figure(figsize=(10.5, 4.4), layout="constrained")
        by_kind, by_cost = figure.subplots(1, 2, width_ratios=(1.45, 1))
        _draw_kinds(by_kind, results["methods"], _titled(results))
        _draw_costs(by_cost, results["methods"], _titled(results))
        handles, labels = by_kind.get_legend_handles_labels()
        columns = len(labels) if len(labels) <= 7 else -(-len(labels) // 2)
        figure.legend(
            handles,
            labels,
            loc="outside lower center",
            ncols=columns,
            frameon=False,
            columnspacing=1.4,
            handletextpad=0.3,
        )
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        figure.savefig(temporary)
    return Path(path)


def _titled(results: Mapping[str, Any]) -> str:
    """The metric's name where all tasks share one."""
    titles = {task["title"] for task in results["tasks"].values()}
    [title, *others] = titles
    if others:
        return "Score"
    return "Exact match" if title == "EM" else title


def _draw_kinds(axes: Axes, methods: Mapping[str, Any], title: str) -> None:
    kinds = list(next(iter(methods.values()))["tasks"])
    step = 0.8 / len(methods)
    for index, (label, summary) in enumerate(methods.items()):
        cells = [summary["tasks"][kind] for kind in kinds]
        if summary["method"] == "full-prefill":
            _reference(axes, [cell["score"] for cell in cells])
        places = [k + (index - (len(methods) - 1) / 2) * step for k in range(len(kinds))]
        _dots(axes, index, label, places, cells)
    for edge in range(1, len(kinds)):
        axes.axvline(edge - 0.5, color="#cccccc", linewidth=0.8)
    axes.set_xticks(range(len(kinds)), kinds)
    axes.set_xlim(-0.5, len(kinds) - 0.5)
    axes.grid(axis="x", visible=False)
    axes.tick_params(axis="x", length=0)
    _as_accuracy(axes)
    axes.set_title(f"{title} by kind of question")


def _draw_costs(axes: Axes, methods: Mapping[str, Any], title: str) -> None:
    timed = all(m["ttft_over_full_prefill"] is not None for m in methods.values())
    cost = "ttft_over_full_prefill" if timed else "recompute_ratio"
    for index, (label, summary) in enumerate(methods.items()):
        _dots(axes, index, label, [summary[cost]], [summary])
    farthest = max(0.05, *(m[cost] for m in methods.values()))
    axes.set_xlim(-0.04 * farthest, 1.06 * farthest)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel("time to first token, of full prefill's" if timed else "tokens recomputed")
    _as_accuracy(axes)
    axes.set_title(f"{title} against cost")
    axes.text(
        1, 1.03, "up and left is better", transform=axes.transAxes, ha="right", color="#777777"
    )


def _reference(axes: Axes, heights: list[float]) -> None:
    """A dotted line at the oracle's height, as wide as each kind, to read gaps off."""
    edges = [k - 0.5 for k in range(len(heights) + 1)]
    axes.hlines(heights, edges[:-1], edges[1:], color="black", linestyle=":", linewidth=1)


def _dots(axes: Axes, index: int, label: str, places: list[float], cells: list[Mapping]) -> None:
    heights = [cell["score"] for cell in cells]
    reach = [
        [max(0.0, cell["score"] - cell["score_ci95"][0]) for cell in cells],
        [max(0.0, cell["score_ci95"][1] - cell["score"]) for cell in cells],
    ]
    axes.errorbar(
        places,
        heights,
        yerr=reach,
        fmt=MARKERS[index % len(MARKERS)],
        color=COLOURS[index % len(COLOURS)],
        markersize=7,
        elinewidth=1.4,
        label=label,
        clip_on=False,
    )


def _as_accuracy(axes: Axes) -> None:
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
