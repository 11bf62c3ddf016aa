"""The study's figures of what reuse leaves behind, on any model: deviation by layer and token.

Source: arXiv:2603.20218, figures 3 (tokens chosen by layer), 4 (cumulative deviation) and 5
(overlap of choices between layers).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from blocktune.evaluation.choice import Chosen, cumulative_of, overlap_of
from blocktune.evaluation.report.style import Ground, as_share, legend_below, mark, to_png


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
        axes.set_xlabel("tokens chosen in any layer, by place; lines: chunks begin")
        axes.set_ylabel("layer")
        axes.set_title(title)
        figure.colorbar(image, ax=axes, label="deviation, of the layer's highest", pad=0.02)

    return to_png(draw, path, height=3.6, width=7.5)


def draw_overlap(chosen: Chosen, path: Path, title: str) -> Path:
    """Heat map: how many tokens chosen at one layer are chosen at another."""
    shares = overlap_of(chosen)

    def draw(figure: Figure, ground: Ground) -> None:
        axes = figure.subplots()
        axes.grid(visible=False)
        image = axes.imshow(shares, origin="lower", vmin=0, vmax=1, cmap="viridis")
        axes.set_xlabel("layer that is asked")
        axes.set_ylabel("layer that chose")
        axes.set_title(title)
        bar = figure.colorbar(image, ax=axes, label="chosen by both", pad=0.02)
        as_share(bar.ax.yaxis)

    return to_png(draw, path, height=4.0)


def draw_cumulative(
    deviations: Mapping[str, NDArray[np.float64]], path: Path, layer: int, title: str
) -> Path:
    """Deviation accrued over tokens, the highest first, for several methods at one layer."""

    def draw(figure: Figure, ground: Ground) -> None:
        axes = figure.subplots()
        for index, (label, deviation) in enumerate(deviations.items()):
            accrued = cumulative_of(deviation)[layer]
            places = np.arange(1, len(accrued) + 1) / len(accrued)
            axes.plot(places, accrued, label=label, color=mark(ground, index + 2)["color"])
        as_share(axes.xaxis)
        axes.set_xlim(0, 1)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("context tokens, highest deviation first")
        axes.set_ylabel("deviation of keys, accrued")
        axes.set_title(title)
        legend_below(figure, axes)

    return to_png(draw, path, height=3.6)
