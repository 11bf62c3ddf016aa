"""Bars: every method's name and colour can be told in the picture."""

import matplotlib as mpl
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from blocktune.evaluation import figure_bars
from blocktune.evaluation.report.style import LIGHT, settings


def drawn(monkeypatch, labels) -> Figure:
    """The figure, laid out as it is saved."""
    made = []

    def keep(draw, path, height, width):
        with mpl.rc_context(settings(LIGHT)):
            figure = Figure(figsize=(width, height), layout="constrained")
            draw(figure, LIGHT)
            figure.draw_without_rendering()
        made.append(figure)
        return path

    monkeypatch.setattr(figure_bars, "to_png", keep)
    cell = {"score": 0.5, "score_ci95": [0.4, 0.6]}
    tasks = {"self-contained": cell, "cross-chunk": cell, "2-hop": cell}
    figure_bars.draw_bars({"methods": {label: {"tasks": tasks} for label in labels}}, "x.png")
    return made[0]


@pytest.mark.parametrize("length", [3, 27, 40])
@pytest.mark.parametrize("count", [2, 9, 20])
def test_the_legend_stays_inside_the_picture(monkeypatch, count, length):
    figure = drawn(
        monkeypatch, [f"{i:02} {'recompute-aware + deviation' * 2}"[:length] for i in range(count)]
    )
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.x1


def test_no_two_methods_look_alike(monkeypatch):
    figure = drawn(monkeypatch, [f"method {i}" for i in range(12)])
    looks = {(to_hex(p.get_facecolor()), p.get_hatch()) for p in figure.legends[0].get_patches()}
    assert len(looks) == 12
