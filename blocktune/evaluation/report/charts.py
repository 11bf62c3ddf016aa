"""The report's pictures of `results.json`: score against cost, by task, by place and by length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from blocktune.evaluation.report.style import Draw, Ground, as_share, legend_below, mark

Results = Mapping[str, Any]


class Chart(NamedTuple):
    """A picture of the report.

    Attributes:
        name: Of its PNG.
        title: Above it.
        about: What it shows, in a sentence; also what a screen reader says.
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
    found += [_by_group(results, name, rows) for name in _groups(methods)]
    for name, title, label in _SWEEPS:
        if results["sweeps"][name]:
            found.append(_sweep(results, name, title, label, rows))
    return found


_SWEEPS = (
    ("place", "Where the evidence stands", "place among the chunks, first to last"),
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
            _dot(axes, ground, index, one, summary[cost] * factor, summary)
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


def _by_group(results: Results, group: str, rows: float) -> Chart:
    methods = results["methods"]

    def draw(figure: Figure, ground: Ground) -> None:
        axes = figure.subplots()
        for index, summary in enumerate(reversed(methods.values())):
            cell = summary["tasks"][group]
            number = len(methods) - 1 - index
            low, high = cell["score_ci95"]
            reach = [[max(0.0, cell["score"] - low)], [max(0.0, high - cell["score"])]]
            style = mark(ground, number)
            axes.errorbar(cell["score"], index, xerr=reach, fmt=style["marker"], **_tint(style))
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


def _dot(axes, ground: Ground, index: int, label: str, place: float, summary: Mapping) -> None:
    low, high = summary["score_ci95"]
    reach = [[max(0.0, summary["score"] - low)], [max(0.0, high - summary["score"])]]
    style = mark(ground, index)
    axes.errorbar(
        place, summary["score"], yerr=reach, fmt=style["marker"], label=label, **_tint(style)
    )


def _tint(style: Mapping[str, str]) -> dict[str, Any]:
    return {"color": style["color"], "markersize": 6, "elinewidth": 1.3, "clip_on": False}


def _groups(methods: Mapping[str, Any]) -> Sequence[str]:
    return list(next(iter(methods.values()))["tasks"])


def _file_name(group: str) -> str:
    return "".join(c if c.isalnum() or c == "-" else "-" for c in group)
