"""How pictures look: one colour and marker for each method, named by legends."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any
from zlib import crc32

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from blocktune.files import replacing

PAPER, INK, FAINT = "#ffffff", "#1a1a1a", "#d9d9d9"  # behind a picture; text and axes; grid lines
SERIES = ("#000000", "#7d7d7d", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#D98E00", "#3AA0DC")
"""In the order of `COLOURS`: Okabe and Ito's, told apart by all common forms of colour vision."""
_LOOKS = {
    "ink": {"full-prefill": "s", "prefix-cache": "D", "oracle": "*", "control": "X"},
    "grey": {"no-context": "X", "random": "h"},
    "red": {"naive": "v", "prompt-cache-schema": "<"},
    "blue": {"block-attention": "o", "block-distill": "p", "turborag": ">", "kv-packet": "h"},
    "green": {"kvlink": "D", "query-attention": "^", "cacheclip": "P"}
    | {"selective-reconstruction": "s"},
    "pink": {"cacheblend": "^", "cacheblend-lmcache": "<", "cacheblend-paper": ">"}
    | {"cacheblend-lmcache-flash": "8"}
    | {"cacheblend-repo": "D"}
    | {"droidspeak": "p", "droidspeak-clc": "h"},
    "orange": {"epic": "P", "link0": "X", "cache-craft": "d", "s+p": "s"},
    "sky": {"recompute-aware": "p", "dual-mode": "d", "ape": "h", "sel": "o", "psr": "*"},
}
METHODS = {name: (colour, m) for colour, own in _LOOKS.items() for name, m in own.items()}
"""Colour and marker of each method, the same in every picture."""
COLOURS, MARKERS = tuple(_LOOKS), "sDv<o>^Xhp*Pd"
PHONE_INCHES = 4.6  # width of a picture whose text is still read at 358 pixels, a phone's page
SMALL = 8.5  # points of a label inside a picture

Draw = Callable[[Figure], None]


def mark(label: str) -> dict[str, Any]:
    """Colour and marker of a method, as keywords of ``Axes.plot``.

    A label that begins with a method's name (``cacheblend 30 %``, ``kvlink + epic``) is a variant:
    it has the method's colour and marker, hollow. Other labels get a look derived from their text.
    """
    parts = re.split(r"(?=[ :,])|(?<=[a-z])(?=-\d)", label)
    starts = ["".join(parts[:stop]) for stop in range(len(parts), 0, -1)]
    known = next((start for start in starts if start in METHODS), None)
    if known is None:
        number = crc32(label.encode())
        colour = COLOURS[2 + number % (len(COLOURS) - 2)]
        marker = MARKERS[number // len(COLOURS) % len(MARKERS)]
    else:
        colour, marker = METHODS[known]
    found = SERIES[COLOURS.index(colour)]
    filled = known is None or known == label
    return {"color": found, "marker": marker, "markerfacecolor": found if filled else PAPER}


def to_svg(draw: Draw, height: float) -> bytes:
    """A picture as SVG, the same bytes for the same picture."""
    out = io.BytesIO()
    with mpl.rc_context(SETTINGS):
        made = _made(draw, height, PHONE_INCHES)
        made.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()


def to_png(draw: Draw, path: str | Path, height: float, width: float = PHONE_INCHES) -> Path:
    """A picture as a PNG, whole or not at all; returns its path."""
    with mpl.rc_context(SETTINGS), replacing(path) as temporary:
        _made(draw, height, width).savefig(temporary, dpi=200)
    return Path(path)


def _made(draw: Draw, height: float, width: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    draw(figure)
    return figure


SETTINGS = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor"), INK),
    **dict.fromkeys(("xtick.color", "ytick.color"), INK),
    "font.size": 10,
    "figure.dpi": 150,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlesize": 11,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "lines.markersize": 5,
    "svg.hashsalt": "blocktune",  # equal pictures are equal files
}


def as_share(axis: Any) -> None:
    """Writes an axis of shares in percent."""
    axis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))


def label_ends(axes: Axes, ends: Mapping[str, tuple[float, str]]) -> None:
    """Names the lines on the right, in the order in which they end there, each in its colour.

    ``ends`` are name -> height of the end in data, and colour.
    """
    ranked = sorted(ends, key=lambda name: -ends[name][0])
    lines = [Line2D([], [], color=ends[name][1]) for name in ranked]
    look = {"loc": "center left", "bbox_to_anchor": (1, 0.5), "fontsize": SMALL, "frameon": False}
    axes.legend(lines, ranked, labelcolor="linecolor", handlelength=0.8, **look)


def name_points(figure: Figure, labels: Collection[str]) -> None:
    """Names methods below the picture, each beside its colour and marker."""
    points = [Line2D([], [], linestyle="", **mark(label)) for label in labels]
    look = {"loc": "outside lower left", "fontsize": SMALL, "frameon": False, "handletextpad": 0.2}
    figure.legend(points, labels, ncols=2, columnspacing=1, **look)
