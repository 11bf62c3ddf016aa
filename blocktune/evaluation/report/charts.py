"""Charts of ``results.json``: score by task, against cost, by position and by context length."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from blocktune.evaluation.report import style
from blocktune.evaluation.report.style import Ground, mark
from blocktune.evaluation.results import FLOOR, ORACLE

Results = Mapping[str, Any]
Cell = Mapping[str, Any]  # ``score`` with ``score_ci95``, and more
MOST_LINES = 8  # in a chart; of more methods, the baselines and the Pareto front
MOST_GROUPS = 6  # tasks or kinds of questions side by side; of more, the mean over all
_SWEEPS = {
    "place": ("Position of the evidence", "position among the chunks, first to last"),
    "context_tokens": ("Length of the context", "context length, tokens"),
}
_COSTS = {
    "ttft_s": ("time to first token", "time to first token, ms", 1000),
    "ttft_over_full_prefill": ("time to first token", "time to first token / full prefill's", 1),
    "recompute_ratio": ("recomputed share", "share of layer-tokens recomputed", 1),
}


class Chart(NamedTuple):
    """A chart of the report."""

    name: str  # name of its PNG file
    title: str  # heading
    about: str  # caption, also the alternative text for screen readers
    fill: Callable[[Axes, Ground], None]  # draws all but the title
    height: float  # in inches

    def draw(self, figure: Figure, ground: Ground) -> None:
        """Draws the chart into an empty figure."""
        axes = figure.subplots()
        axes.set_title(style.short(self.title))
        self.fill(axes, ground)


def charts_of(results: Results) -> list[Chart]:
    """The charts that these results have data for."""
    methods, pareto = results["methods"], results["budget"]["pareto"]
    costs = [cost for cost in ("ttft_s", "recompute_ratio") if cost in pareto]
    charts = [cost_chart(methods, pareto, cost) for cost in costs]
    charts += [_group_chart(methods, *group) for group in groups_of(methods).items()]
    return charts + [_sweep_chart(results, name) for name in _SWEEPS if results["sweeps"][name]]


def groups_of(methods: Mapping[str, Cell], most: int | None = None) -> dict[str, Any]:
    """Scores by task, or kind of questions, and method; of more than ``most``, ``all`` as one."""
    names = next(iter(methods.values()))["tasks"]
    if most is not None and len(names) > most:
        return {"all": methods}
    return {name: {label: m["tasks"][name] for label, m in methods.items()} for name in names}


def cost_chart(methods: Mapping[str, Any], pareto: Mapping[str, Sequence[str]], cost: str) -> Chart:
    """Chart of the methods' scores against a cost; ``pareto`` has the Pareto front by cost."""
    name, _, _ = _COSTS[cost]
    about = f"Score of every method against its {name}; up and left is better. The grey line is "
    about += "the Pareto front, the best score at each cost. Bars are 95 % intervals."
    fill = partial(_draw_costs, methods=methods, cost=cost, front=pareto[cost])
    title, height = f"Score against {name}", 3.4 + 0.06 * len(methods)
    return Chart(f"score-by-{cost}", title, about, fill, height)


def _draw_costs(
    axes: Axes, ground: Ground, methods: Mapping[str, Any], cost: str, front: Sequence[str] = ()
) -> None:
    _, label, factor = _COSTS[cost]
    places = {name: summary[cost] * factor for name, summary in methods.items()}
    heights = [methods[name]["score"] for name in front]
    axes.step([places[name] for name in front], heights, where="post", color=ground.faint, lw=3)
    start = style.zoom(axes, _ends(methods, {n: [m] for n, m in methods.items()}), "score")
    largest = max(0.05, *places.values())
    axes.set_xlim(-0.04 * largest, 1.05 * largest)
    if factor == 1:
        style.as_share(axes.xaxis)
    points = []
    for name, summary in methods.items():
        height = _draw_score(axes, mark(ground, name), summary, places[name], start)
        points.append((places[name], height, _named(name, summary["score"], start)))
    axes.set_xlabel(label)
    points.sort(key=lambda point: point[2] not in front)  # these first, if there is little room
    style.label_points(axes, ground, points)


def _group_chart(methods: Mapping[str, Cell], group: str, cells: Mapping[str, Cell]) -> Chart:
    fill = partial(_draw_rows, methods=methods, cells=cells)
    name = "".join(c if c.isalnum() else "-" for c in f"task-{group}")
    if name != f"task-{group.lower()}" or len(name) > style.LONGEST:  # else others have the name
        name = f"{name[: style.LONGEST]}-{crc32(group.encode()):08x}"
    about = f"Score of every method on {group} with its 95 % interval. Dotted line: full prefill."
    return Chart(name, group, about, fill, 0.9 + 0.25 * len(methods))


def _draw_rows(
    axes: Axes, ground: Ground, methods: Mapping[str, Cell], cells: Mapping[str, Cell]
) -> None:
    every = {name: m["tasks"].values() for name, m in methods.items()}
    start = style.zoom(axes, _ends(methods, every), "score", axis="x")
    for row, (label, cell) in enumerate(reversed(cells.items())):
        _draw_score(axes, mark(ground, label), cell, row, start, axis="x")
        axes.annotate(
            f"{100 * cell['score']:.1f}", (1, row), xycoords=("axes fraction", "data"),
            xytext=(6, 0), textcoords="offset points", va="center_baseline", fontsize=style.SMALL,
        )  # fmt: skip
        if methods[label]["method"] == ORACLE and not methods[label]["adapter"]:
            axes.axvline(cell["score"], color=ground.ink, linestyle=":", linewidth=1, zorder=0)
    axes.set_yticks(range(len(cells)), list(map(style.short, reversed(cells))))
    axes.set_ylim(-0.8, len(cells) - 0.4)
    axes.tick_params(axis="y", length=0, pad=7)
    axes.grid(axis="y", visible=False)


def _sweep_chart(results: Results, name: str) -> Chart:
    (title, label), bins = _SWEEPS[name], results["sweeps"][name]
    methods = results["methods"]
    if len(methods) > MOST_LINES:
        front = results["budget"]["pareto"]["recompute_ratio"]
        kept = [n for n, m in methods.items() if n in front or m["method"] in (ORACLE, FLOOR)]
        methods = {n: methods[n] for n in kept[:MOST_LINES]}

    def fill(axes: Axes, ground: Ground) -> None:
        places, ends = [(b["from"] + b["to"]) / 2 for b in bins], {}
        cells = {method: [b["scores"][method] for b in bins] for method in methods}
        start = style.zoom(axes, _ends(methods, cells, "ci95"), "score")
        for index, (method, own) in enumerate(cells.items()):
            shift = (index - len(cells) / 2) * 0.006 * (places[-1] - places[0])  # separates bars
            heights, moved = [cell["score"] for cell in own], [place + shift for place in places]
            line = mark(ground, method) | {"lw": 1.4, "elinewidth": 0.7}
            axes.errorbar(moved, heights, yerr=_reach(own, "ci95"), **line)
            ends[_named(method, heights[-1], start)] = max(heights[-1], start), line["color"]
        axes.set_xlabel(label)
        style.label_ends(axes, ends)

    about = f"Score by {label}, with 95 % intervals. Each point is a bin of five or more questions."
    return Chart(f"sweep-{name}", title, about, fill, 3.4)


def draw_results(results: Results, path: str | Path, title: str = "") -> Path:
    """Draws scores by kind, and against time (if measured) or recomputed share, as one PNG."""
    methods, groups = results["methods"], groups_of(results["methods"], MOST_GROUPS)
    timed = all(m["ttft_over_full_prefill"] is not None for m in methods.values())
    cost = "ttft_over_full_prefill" if timed else "recompute_ratio"
    titles = {task["title"] for task in results["tasks"].values()}
    metric = "Score" if len(titles) > 1 else titles.pop()
    metric = "Exact match" if metric == "EM" else metric

    def draw(figure: Figure, ground: Ground) -> None:
        widths = [1.0] * len(groups) + [1.9]
        *panels, last = figure.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0]
        for axes, (group, cells) in zip(panels, groups.items(), strict=True):
            _draw_rows(axes, ground, methods, cells)
            axes.set_title(style.short(group))
        for axes in panels[1:]:
            axes.set_yticklabels([])
        figure.suptitle(f"{metric}: {title}", x=0.01, ha="left", fontsize=12, fontweight="bold")
        _draw_costs(last, ground, methods, cost)
        last.set_title("against cost: up and left is better")

    width = 4.6 + 0.07 * max(len(style.short(label)) for label in methods) + 2.2 * len(groups)
    return style.to_png(draw, path, 1.3 + max(0.26 * len(methods), 2.4), min(width, 15))


def _draw_score(
    axes: Axes, look: Mapping[str, Any], cell: Cell, place: float, start: float, axis: str = "y"
) -> float:
    """Draws a score with its interval, or an arrow if it is below ``start``; returns its place."""
    at = max(cell["score"], start)
    x, y = (place, at) if axis == "y" else (at, place)
    if cell["score"] < start:
        axes.plot(x, y, clip_on=False, **look | {"marker": "v" if axis == "y" else "<"})
    else:
        bars = {f"{axis}err": _reach([cell]), "elinewidth": 1.5}
        axes.errorbar([x], [y], linestyle="", clip_on=False, **look, **bars)
    return at


def _named(label: str, score: float, start: float) -> str:
    return label if score >= start else f"{label} ({100 * score:.0f} %)"


def _ends(
    methods: Mapping[str, Cell], cells: Mapping[str, Iterable[Cell]], key: str = "score_ci95"
) -> list[float]:
    """Ends of all intervals but those of ``no-context``, which would squeeze the others."""
    kept = [label for label in cells if methods[label]["method"] != "no-context"]
    return [end for label in kept for cell in cells[label] for end in cell[key]]


def _reach(cells: Sequence[Mapping[str, Any]], key: str = "score_ci95") -> list[list[float]]:
    """Lengths of the intervals below and above the scores, as matplotlib's error bars."""
    below = [max(0.0, cell["score"] - cell[key][0]) for cell in cells]
    return [below, [max(0.0, cell[key][1] - cell["score"]) for cell in cells]]
