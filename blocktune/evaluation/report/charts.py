"""Pictures of `results.json`: score by task, against cost, by place and by length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from blocktune.evaluation.report.style import Draw, Ground, as_share, legend_below, mark, to_png

Results = Mapping[str, Any]


class Chart(NamedTuple):
    """A picture of the report.

    Attributes:
        name: Of its PNG.
        title: Above it.
        about: What it shows, in a sentence; also for screen readers.
        draw: Draws it.
        height: In inches.
    """

    name: str
    title: str
    about: str
    draw: Draw
    height: float


def charts_of(results: Results) -> list[Chart]:
    """The pictures that these results have numbers for."""
    methods = results["methods"]
    rows = -(-len(methods) // 2) * 0.19
    found = []
    if "ttft_s" in results["budget"]["pareto"]:
        found.append(cost_chart(results, "ttft_s", rows))
    found.append(cost_chart(results, "recompute_ratio", rows))
    found += [_by_group(results, name) for name in _groups(methods)]
    for name, title, label in _SWEEPS:
        if results["sweeps"][name]:
            found.append(_sweep(results, name, title, label, rows))
    return found


_SWEEPS = (
    ("place", "Position of the evidence", "place among the chunks, first to last"),
    ("context_tokens", "How long the context is", "tokens of context"),
)
_COSTS = {
    "ttft_s": ("time to first token", "time to first token, ms", 1000),
    "recompute_ratio": ("recomputed share", "context's layer-tokens recomputed", 1),
}


def cost_chart(results: Results, cost: str, rows: float) -> Chart:
    """Score of every method against one of its costs, and the Pareto front."""
    methods = results["methods"]
    name, label, factor = _COSTS[cost]
    front = results["budget"]["pareto"][cost]

    def draw(figure: Figure, ground: Ground) -> None:
        axes = figure.subplots()
        places = [methods[one][cost] * factor for one in front]
        heights = [methods[one]["score"] for one in front]
        axes.step(places, heights, where="post", color=ground.faint, linewidth=3, zorder=0)
        for index, (one, summary) in enumerate(methods.items()):
            place, score = summary[cost] * factor, summary["score"]
            _points(axes, ground, index, one, [place], [score], yerr=_reach([summary]))
        axes.set_xlabel(label)
        axes.set_ylabel("score")
        if factor == 1:
            as_share(axes.xaxis)
        as_share(axes.yaxis)
        axes.set_xlim(left=min(0, *axes.get_xlim()))
        axes.set_ylim(bottom=0)
        legend_below(figure, axes)

    return Chart(
        f"score-by-{cost}",
        f"Score against {name}",
        f"Every method's score against its {name}; up and left is better. The grey line is the "
        "Pareto front: no method above it at that cost. Bars are 95 % intervals.",
        draw,
        3.1 + rows,
    )


def _by_group(results: Results, group: str) -> Chart:
    methods = results["methods"]

    def draw(figure: Figure, ground: Ground) -> None:
        axes = figure.subplots()
        for index, (label, summary) in enumerate(methods.items()):
            cell, place = summary["tasks"][group], len(methods) - 1 - index
            _points(axes, ground, index, label, [cell["score"]], [place], xerr=_reach([cell]))
            if summary["method"] == "full-prefill":
                axes.axvline(cell["score"], color=ground.ink, linestyle=":", linewidth=1)
        axes.set_yticks(range(len(methods)), list(reversed(methods)))
        axes.grid(axis="y", visible=False)
        axes.set_xlim(-0.03, 1.03)  # the same for all tasks, so that they compare
        as_share(axes.xaxis)

    return Chart(
        f"task-{_file_name(group)}",
        group,
        f"Score of every method on {group} with its 95 % interval; dotted: full prefill.",
        draw,
        0.9 + 0.27 * len(methods),
    )


def _sweep(results: Results, name: str, title: str, label: str, rows: float) -> Chart:
    bins = results["sweeps"][name]

    def draw(figure: Figure, ground: Ground) -> None:
        axes = figure.subplots()
        places = [(one["from"] + one["to"]) / 2 for one in bins]
        for index, method in enumerate(results["methods"]):
            heights = [one["scores"][method]["score"] for one in bins]
            style = mark(ground, index)
            axes.plot(places, heights, label=method, markersize=5, linewidth=1.2, **style)
        axes.set_xlabel(label)
        axes.set_ylabel("score")
        as_share(axes.yaxis)
        legend_below(figure, axes)

    about = f"Score by {label}; each point is a bin of at least five questions."
    return Chart(f"sweep-{name}", title, about, draw, 2.9 + rows)


def draw_results(results: Results, path: str | Path, title: str = "") -> Path:
    """Draws a run as one PNG, whole or not at all; returns its path.

    Left: the headline score by kind with 95 % intervals. Right: it against time to first token
    as a share of full prefill's or, where that was not measured, the recomputed share.
    """
    methods = results["methods"]
    titles = {task["title"] for task in results["tasks"].values()}
    metric = "Score" if len(titles) > 1 else next(iter(titles)).replace("EM", "Exact match")

    def draw(figure: Figure, ground: Ground) -> None:
        by_kind, by_cost = figure.subplots(1, 2, width_ratios=(1.45, 1))
        _draw_kinds(by_kind, ground, methods)
        _draw_costs(by_cost, ground, methods)
        for axes, what in ((by_kind, "by kind of question"), (by_cost, "against cost")):
            axes.set_ylim(0, 1.02)
            as_share(axes.yaxis)
            axes.set_title(f"{metric} {what}")
        legend_below(figure, by_kind, len(methods) if len(methods) <= 7 else -(-len(methods) // 2))
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)

    return to_png(draw, path, height=4.4, width=10.5)


def _draw_kinds(axes: Axes, ground: Ground, methods: Mapping[str, Any]) -> None:
    kinds = _groups(methods)
    step = 0.8 / len(methods)
    for index, (label, summary) in enumerate(methods.items()):
        cells = [summary["tasks"][kind] for kind in kinds]
        heights = [cell["score"] for cell in cells]
        if summary["method"] == "full-prefill":  # a line as wide as each kind, to read gaps off
            edges = [k - 0.5 for k in range(len(kinds) + 1)]
            axes.hlines(heights, edges[:-1], edges[1:], color=ground.ink, linestyle=":")
        places = [k + (index - (len(methods) - 1) / 2) * step for k in range(len(kinds))]
        _points(axes, ground, index, label, places, heights, yerr=_reach(cells))
    for edge in range(1, len(kinds)):
        axes.axvline(edge - 0.5, color=ground.faint, linewidth=0.8)
    axes.set_xticks(range(len(kinds)), kinds)
    axes.set_xlim(-0.5, len(kinds) - 0.5)
    axes.grid(axis="x", visible=False)
    axes.tick_params(axis="x", length=0)


def _draw_costs(axes: Axes, ground: Ground, methods: Mapping[str, Any]) -> None:
    timed = all(m["ttft_over_full_prefill"] is not None for m in methods.values())
    cost = "ttft_over_full_prefill" if timed else "recompute_ratio"
    for index, (label, summary) in enumerate(methods.items()):
        place, score = summary[cost], summary["score"]
        _points(axes, ground, index, label, [place], [score], yerr=_reach([summary]))
    farthest = max(0.05, *(m[cost] for m in methods.values()))
    axes.set_xlim(-0.04 * farthest, 1.06 * farthest)
    as_share(axes.xaxis)
    axes.set_xlabel("time to first token, of full prefill's" if timed else "tokens recomputed")


def _points(
    axes: Axes,
    ground: Ground,
    index: int,
    label: str,
    x: Sequence[float],
    y: Sequence[float],
    **reach: Any,
) -> None:
    """Points of one method with their intervals, in its colour and marker."""
    style = mark(ground, index)
    look = {"color": style["color"], "markersize": 6, "elinewidth": 1.3, "clip_on": False}
    axes.errorbar(x, y, fmt=style["marker"], label=label, **look, **reach)


def _reach(cells: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    """How far intervals of scores reach down and up."""
    return [
        [max(0.0, cell["score"] - cell["score_ci95"][0]) for cell in cells],
        [max(0.0, cell["score_ci95"][1] - cell["score"]) for cell in cells],
    ]


def _groups(methods: Mapping[str, Any]) -> Sequence[str]:
    return list(next(iter(methods.values()))["tasks"])


def _file_name(group: str) -> str:
    return "".join(c if c.isalnum() or c == "-" else "-" for c in group)
