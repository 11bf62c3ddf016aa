"""How pictures look: one palette and one set of markers, on light and on dark ground."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from blocktune.files import replacing

MARKERS = ("s", "x", "v", "o", "D", "^", "P", "X", "h")  # one more: pairs repeat after 72


class Ground(NamedTuple):
    """Colours of a picture.

    Attributes:
        paper: Behind it.
        ink: Text and axes.
        faint: Grid lines and secondary text.
        series: Okabe and Ito's palette, told apart by all common forms of colour vision.
    """

    paper: str
    ink: str
    faint: str
    series: tuple[str, ...]


_HUES = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
LIGHT = Ground("#ffffff", "#1a1a1a", "#d9d9d9", ("#000000", "#8a8a8a", *_HUES))
DARK = Ground(
    "#16181c",
    "#e8e8e8",
    "#3a3d44",
    ("#f2f2f2", "#9a9a9a", "#FF8A3D", "#4FA8DE", "#2BC79A", "#E39AC3", "#F0B63A", "#7CC7F2"),
)
PHONE_INCHES = 4.6
"""Width of a picture whose text is still read at 358 pixels, a phone's page."""

Draw = Callable[[Figure, Ground], None]


def settings(ground: Ground) -> dict:
    """Matplotlib's settings for a picture on this ground."""
    return {
        "font.size": 10,
        "figure.dpi": 150,
        "figure.facecolor": ground.paper,
        "axes.facecolor": ground.paper,
        "savefig.facecolor": ground.paper,
        "text.color": ground.ink,
        "axes.labelcolor": ground.ink,
        "axes.edgecolor": ground.ink,
        "xtick.color": ground.ink,
        "ytick.color": ground.ink,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlelocation": "left",
        "axes.titleweight": "bold",
        "axes.titlesize": 11,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": ground.faint,
        "grid.linewidth": 0.6,
        "legend.frameon": False,
        "legend.fontsize": 9,
        "svg.hashsalt": "blocktune",  # equal pictures are equal files
    }


def to_svg(draw: Draw, ground: Ground, height: float, width: float = PHONE_INCHES) -> bytes:
    """A picture as SVG, the same bytes for the same picture."""
    out = io.BytesIO()
    with mpl.rc_context(settings(ground)):
        _made(draw, ground, (width, height)).savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()


def to_png(draw: Draw, path: str | Path, height: float, width: float = PHONE_INCHES) -> Path:
    """A picture on light ground as a PNG, whole or not at all; returns its path."""
    with mpl.rc_context(settings(LIGHT)), replacing(path) as temporary:
        _made(draw, LIGHT, (width, height)).savefig(temporary, dpi=220)
    return Path(path)


def _made(draw: Draw, ground: Ground, size: tuple[float, float]) -> Figure:
    figure = Figure(figsize=size, layout="constrained")
    draw(figure, ground)
    return figure


def mark(ground: Ground, index: int) -> dict:
    """Colour and marker of the method at a place in the suite, the same in all pictures."""
    return {
        "color": ground.series[index % len(ground.series)],
        "marker": MARKERS[index % len(MARKERS)],
    }


def as_share(axis) -> None:
    """Writes an axis of shares in percent."""
    axis.set_major_formatter(PercentFormatter(1, decimals=0))


def legend_below(figure: Figure, axes: Axes, columns: int = 2) -> None:
    """The legend under the picture, where a phone has room."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=min(columns, max(1, len(labels))),
        columnspacing=1.2,
        handletextpad=0.4,
    )
