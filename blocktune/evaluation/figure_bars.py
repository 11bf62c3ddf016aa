"""Bars of finished results: methods side by side on every task, and PSR's ablation.

Source: arXiv:2603.20218, figures 2 and 4 to 8 (bars of methods) and 9 (PSR).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from blocktune.evaluation.report.style import Ground, as_share, legend_below, to_png

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
