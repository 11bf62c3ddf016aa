"""Style of the charts: a colour and marker per method, direct labels, marked zoomed axes."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator, MaxNLocator, PercentFormatter
from matplotlib.transforms import Bbox

from blocktune.files import replacing


class Ground(NamedTuple):
    """Colours of a light or dark chart, after Okabe and Ito for all common colour vision."""

    paper: str  # background
    ink: str  # text and axes
    faint: str  # grid lines and secondary lines
    series: tuple[str, ...]  # colours of the methods, in the order of `COLOURS`


LIGHT = Ground(
    *("#ffffff", "#1a1a1a", "#d9d9d9"),
    ("#000000", "#7d7d7d", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#D98E00", "#3AA0DC"),
)
DARK = Ground(
    *("#16181c", "#e8e8e8", "#3a3d44"),
    ("#f2f2f2", "#9a9a9a", "#FF8A3D", "#4FA8DE", "#2BC79A", "#E39AC3", "#F0B63A", "#7CC7F2"),
)
_LOOKS = {
    "ink": {"full-prefill": "s", "prefix-cache": "D", "oracle": "*", "control": "X"},
    "grey": {"no-context": "X", "random": "h"},
    "red": {"naive": "v", "prompt-cache-schema": "<"},
    "blue": {"block-attention": "o", "block-distill": "p", "turborag": ">", "kv-packet": "h"},
    "green": {"kvlink": "D", "query-attention": "^", "cacheclip": "P"}
    | {"selective-reconstruction": "s", "prophetkv": "v", "a3": "<"}
    | {"infoflow": ">", "relaxkv": "*"},
    "pink": {"cacheblend": "^", "cacheblend-lmcache": "<", "cacheblend-paper": ">"}
    | {"cacheblend-lmcache-flash": "8", "cacheblend-repo": "D"}
    | {"droidspeak": "p", "droidspeak-clc": "h"},
    "orange": {"epic": "P", "link0": "X", "cache-craft": "d", "s+p": "s"},
    "sky": {"recompute-aware": "p", "dual-mode": "d", "ape": "h", "sel": "o", "psr": "*"},
}
METHODS = {name: (colour, m) for colour, own in _LOOKS.items() for name, m in own.items()}
"""Colour and marker of each method, the same in every chart."""
COLOURS, MARKERS = tuple(_LOOKS), "sDv<o>^Xhp*Pd"
PHONE_INCHES = 4.6  # width of a chart that is readable at 358 pixels, the width of a phone's page
SMALL = 8.5  # font size of labels inside a chart, in points
LONGEST = 36  # letters of a name in a chart; of longer ones the middle is left out

Draw = Callable[[Figure, Ground], None]


def short(name: str) -> str:
    """A name as charts show it."""
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 13]}…{name[-12:]}"


def mark(ground: Ground, label: str) -> dict[str, Any]:
    """Colour and marker of a method, as keywords of ``Axes.plot``.

    A label that begins with a method's name has its look, but hollow; others, one by their hash.
    """
    parts = re.split(r"(?=[ :,])|(?<=[a-z])(?=-\d)", label)
    starts = ["".join(parts[:stop]) for stop in range(len(parts), 0, -1)]
    number, count = crc32(label.encode()), len(COLOURS)
    hashed = COLOURS[2 + number % (count - 2)], MARKERS[number // count % len(MARKERS)]
    method = next((start for start in starts if start in METHODS), label)
    colour, marker = METHODS.get(method, hashed)
    color = ground.series[COLOURS.index(colour)]
    face = color if method == label else ground.paper
    return {"color": color, "marker": marker, "markerfacecolor": face}


def to_svg(draw: Draw, ground: Ground, height: float, width: float = PHONE_INCHES) -> bytes:
    """Draws a chart as SVG; equal charts give equal bytes."""
    out = io.BytesIO()
    _save(draw, ground, (width, height), out, format="svg", metadata={"Date": None})
    return out.getvalue()


def to_png(draw: Draw, path: str | Path, height: float, width: float = PHONE_INCHES) -> Path:
    """Draws a chart on a light background as PNG, written atomically; returns its path."""
    with replacing(path) as temporary:
        _save(draw, LIGHT, (width, height), temporary, dpi=200)
    return Path(path)


def _save(draw: Draw, ground: Ground, size: tuple[float, float], out: Any, **how: Any) -> None:
    paper = ("figure.facecolor", "axes.facecolor", "savefig.facecolor")
    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    settings = {
        **dict.fromkeys(paper, ground.paper),
        **dict.fromkeys(inked, ground.ink),
        **{"font.size": 10, "figure.dpi": 150, "lines.markersize": 5},
        **{"axes.spines.top": False, "axes.spines.right": False},
        **{"axes.titlelocation": "left", "axes.titleweight": "bold", "axes.titlesize": 11},
        **{"axes.grid": True, "axes.axisbelow": True},
        **{"grid.color": ground.faint, "grid.linewidth": 0.6},
        "svg.hashsalt": "blocktune",  # so that equal charts are equal files
        "text.parse_math": False,  # names may have dollar signs
    }
    with mpl.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s)Glyph .* missing from font")  # for each character
        figure = Figure(figsize=size, layout="constrained")
        draw(figure, ground)
        figure.savefig(out, **how)


def as_share(axis: Any) -> None:
    """Formats an axis of shares in percent."""
    axis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))


def zoomed(values: Sequence[float]) -> tuple[float, float]:
    """Range around shares in steps of 10 %; from 0 if one is below 20 %, to 1 if above 80 %."""
    start = math.floor(10 * min(values, default=0.0) - 0.1) / 10
    end = math.ceil(10 * max(values, default=1.0) + 0.1) / 10
    return start if start >= 0.2 else 0.0, end if end <= 0.8 else 1.0


def zoom(axes: Axes, values: Sequence[float], name: str, axis: str = "y") -> float:
    """Fits an axis of shares to ``values``, and returns its start.

    The label names a range that is not 0 to 1. A start above 0 also gets two strokes.
    """
    upright, (start, end) = axis == "y", zoomed(values)
    own = axes.yaxis if upright else axes.xaxis
    axes.set(**{f"{axis}lim": (start, end + 0.03 * (end - start))})
    separator, ticks = " ", MaxNLocator(6, steps=[1, 2, 5, 10])
    if not upright:
        separator, ticks = "\n", FixedLocator((start, (start + end) / 2, end))
    own.set_major_locator(ticks)
    as_share(own)
    if (start, end) != (0, 1):
        name += f"{separator}(axis from {100 * start:.0f} to {100 * end:.0f} %)"
    if start:
        stroke = ((-1, -0.6), (1, 0.6))
        for at in (0.04, 0.065):
            axes.plot(
                *((0, at) if upright else (at, 0)), clip_on=False, zorder=5, markersize=8,
                marker=stroke if upright else [pair[::-1] for pair in stroke],
                color=mpl.rcParams["text.color"], transform=axes.transAxes,
            )  # fmt: skip
    own.set_label_text(name.lstrip())
    return start


def label_ends(axes: Axes, ends: Mapping[str, tuple[float, str]]) -> None:
    """Writes each line's name at its right end; names that would overlap are moved apart.

    ``ends``: y value and colour by name. Set the limits of ``axes`` first.
    """
    axes.get_ylim()  # brings the limits, and with them the transform, up to date
    figure, at = axes.figure, axes.transData - axes.transAxes
    texts = [
        axes.annotate(
            short(name), (1, at.transform((1, y))[1]), xycoords="axes fraction", xytext=(8, 0),
            textcoords="offset points", va="center", fontsize=SMALL, color=color,
            annotation_clip=False,
        )
        for name, (y, color) in sorted(ends.items(), key=lambda end: end[1][0])
    ]  # fmt: skip
    figure.draw_without_rendering()  # reserves the width of the names
    room = axes.get_window_extent()
    gap = 1.15 * max(text.get_window_extent().height for text in texts)
    heights = [room.height * text.xy[1] for text in texts]
    raised = list(accumulate(heights, lambda below, own: max(own, below + gap)))
    raised[-1] = min(raised[-1], room.height)
    lowered = accumulate(reversed(raised), lambda above, own: min(own, above - gap))
    for text, height in zip(reversed(texts), lowered, strict=True):
        text.set_position((8, (height - room.height * text.xy[1]) * 72 / figure.dpi))


def label_points(axes: Axes, ground: Ground, points: Sequence[tuple[float, float, str]]) -> None:
    """Writes each point's name in the nearest free place beside it, if there is one."""
    figure = axes.figure
    figure.draw_without_rendering()
    inside, size = Bbox.from_extents(axes.bbox.p0, figure.bbox.p1), 8 * figure.dpi / 72
    centres = [axes.transData.transform(point[:2]) for point in points]
    taken = [Bbox.from_bounds(x - size / 2, y - size / 2, size, size) for x, y in centres]
    turns = [(math.cos(k * math.pi / 8), math.sin(k * math.pi / 8)) for k in (0, 8, *range(16))]
    for (x, y, name), (px, _) in zip(points, centres, strict=True):
        text = axes.annotate(
            short(name), (x, y), xytext=(0, 0), textcoords="offset points", va="center", zorder=6,
            color=mark(ground, name)["color"], in_layout=False, annotation_clip=False,
            fontsize=SMALL, path_effects=[withStroke(linewidth=2, foreground=ground.paper)],
        )  # fmt: skip
        room = axes.get_window_extent()
        side = -1 if px > room.x0 + 0.75 * room.width else 1  # at the right, to the left first
        for radius, c, s in ((r, side * c, s) for r in range(8, 120, 7) for c, s in turns):
            text.set_ha("left" if c > 0.3 else "right" if c < -0.3 else "center")
            text.set_position((radius * c, radius * s))
            box = text.get_window_extent()
            fits = inside.contains(*box.p0) and inside.contains(*box.p1)
            if fits and not any(map(box.overlaps, taken)):
                break
        else:  # there is no room for the name
            text.remove()
            continue
        if radius > 15:
            axes.annotate(
                "", (x, y), xytext=(radius * c, radius * s), textcoords="offset points",
                annotation_clip=False, in_layout=False, zorder=1,
                arrowprops={"arrowstyle": "-", "color": ground.series[1], "linewidth": 0.6},
            )  # fmt: skip
        taken.append(box)
