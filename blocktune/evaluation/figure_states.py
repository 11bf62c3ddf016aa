"""The study's figures of what reuse leaves behind, on any model: deviation by layer and token.

Source: arXiv:2603.20218, figures 3 (tokens chosen by layer), 4 (cumulative deviation) and 5
(overlap of choices between layers).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from blocktune.evaluation.probe import Deviation
from blocktune.evaluation.report.style import Ground, as_share, legend_below, mark, to_png
from blocktune.select import top_share

FIRST_TOKENS = 8
"""Tokens of a chunk that count as its beginning."""


class Chosen(NamedTuple):
    """The tokens with the highest deviation in each layer.

    Attributes:
        deviation: Of keys, ``(L, T)``.
        top: Whether a token is among the highest of its layer, ``(L, T)`` bool.
        offset: Place of each token in its chunk, ``(T,)``.
        chunk: Chunk of each token, ``(T,)``.
    """

    deviation: NDArray[np.float64]
    top: NDArray[np.bool_]
    offset: NDArray[np.int64]
    chunk: NDArray[np.int64]


def chosen_tokens(away: Deviation, ratio: float) -> Chosen:
    """Ranks the tokens of a prompt by deviation, layer by layer; layer 0 chooses none.

    Args:
        away: What `deviation` measured for a method that keeps positions.
        ratio: Share of the context tokens that counts as high, in (0, 1].

    Raises:
        ValueError: If the method moves tokens, or the ratio is no such share.
    """
    if away.keys is None:
        raise ValueError(
            "this method puts chunks at other positions than full prefill, so their keys do not "
            "compare; choose one with sequential positions, such as 'naive' or 'link0'"
        )
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio must be a share in (0, 1], got {ratio}")
    keys = away.keys
    everywhere = keys.new_ones(keys.shape).bool()
    total = keys.new_full((len(keys),), keys.shape[1]).long()
    top = top_share(keys, everywhere, total, ratio)
    top[0] = False  # keys of layer 0 know no context: what differs there is rounding
    return Chosen(keys.double().numpy(), top.numpy(), away.offset.numpy(), away.chunk.numpy())


def overlap_of(chosen: Chosen) -> NDArray[np.float64]:
    """Share of the tokens chosen in layer i that are chosen in layer j too, ``(L, L)``."""
    top = chosen.top.astype(float)
    return (top @ top.T) / top.sum(1, keepdims=True).clip(1)


def cumulative_of(deviation: NDArray[np.float64]) -> NDArray[np.float64]:
    """Deviation accrued over tokens from the highest to the lowest, ``(L, T)``, not normalised."""
    return np.cumsum(-np.sort(-deviation, axis=1), axis=1)


def beginnings_of(chosen: Chosen) -> NDArray[np.float64]:
    """Share of each layer's choice that are first tokens of their chunk, ``(L,)``."""
    first = chosen.offset < FIRST_TOKENS
    return chosen.top[:, first].sum(1) / chosen.top.sum(1).clip(1)


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
