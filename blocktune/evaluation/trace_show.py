"""What traces took, as a table for a terminal and as pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich import box
from rich.table import Table

from blocktune.evaluation.report.style import Ground, as_share, legend_below, mark, to_png


def traces_table(results: Mapping[str, Any]) -> Table:
    """The cells of all traces for a terminal."""
    note = (
        "Score in % with half its 95 % interval. Stored: bytes of chunk states in memory at the "
        "end. TTFT: median, with the encoding of chunks that were not cached."
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption=note)
    for heading in ("trace", "method"):
        table.add_column(heading, no_wrap=True)
    for heading in ("memory\nMiB", "score", "stored\nMiB", "hits", "fresh", "TTFT\nms"):
        table.add_column(heading, justify="right")
    for name, trace in results["traces"].items():
        for cell in trace["cells"]:
            table.add_row(name, cell["method"], *_cells(cell))
    return table


def _cells(cell: Mapping[str, Any]) -> tuple[str, ...]:
    low, high = cell["ci95"]
    return (
        str(cell["store_mib"] or "any"),
        f"{100 * cell['score']:.1f} ±{50 * (high - low):.0f}",
        f"{cell['stored_bytes'] / (1 << 20):.1f}",
        "-" if cell["hit_rate"] is None else f"{cell['hit_rate']:.0%}",
        f"{cell['recompute_ratio']:.0%}",
        f"{1000 * cell['ttft_s']:.1f}",
    )


def draw_trace(cells: Sequence[Mapping[str, Any]], path: Path, title: str) -> Path:
    """Score against bytes stored; a larger point waits longer for its first token."""
    slowest = max(cell["ttft_s"] for cell in cells)
    labels = list(dict.fromkeys(cell["method"] for cell in cells))

    def draw(figure: Figure, ground: Ground) -> None:
        axes = figure.subplots()
        for index, label in enumerate(labels):
            own = [cell for cell in cells if cell["method"] == label]
            style = mark(ground, index)
            places = [cell["stored_bytes"] / (1 << 20) for cell in own]
            heights = [cell["score"] for cell in own]
            sizes = [20 + 130 * cell["ttft_s"] / slowest for cell in own]
            axes.plot(places, heights, color=style["color"], linewidth=1, zorder=1)
            axes.scatter(places, heights, s=sizes, label=label, zorder=2, clip_on=False, **style)
        axes.set_xlabel("MiB stored")
        axes.set_ylabel("score")
        as_share(axes.yaxis)
        axes.set_title(f"{title} (larger: slower first token)")
        legend_below(figure, axes)

    return to_png(draw, path, 3.2 + 0.19 * -(-len(labels) // 2))
