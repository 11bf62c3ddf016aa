"""The comparison of checkpoint placements: what is drawn is what the rules give."""

from random import Random

import checkpoints
import pytest
from PIL import Image


@pytest.mark.parametrize("make", [checkpoints.document, checkpoints.system_prompt])
def test_learnt_placements_beat_fixed_ones_and_nothing_beats_the_bound(make):
    rng = Random(1)
    entries = [make(rng, 100) for _ in range(6)]
    lines = checkpoints.measure(entries)
    for budget in (4, 8):
        at = checkpoints.BUDGETS.index(budget)
        cost = {rule: points[at][1] for rule, points in lines.items() if rule != "blocks"}
        assert cost["best, knowing all"] <= cost["dynamic programme"] < cost["evenly"]
        assert lines["dynamic programme"][at][0] <= budget


def test_the_picture_is_drawn(tmp_path):
    results = checkpoints.measure([checkpoints.document(Random(1), 40)])
    path = checkpoints.draw({"one": results, "two": results}, tmp_path / "x.png")
    assert Image.open(path).size[0] > 1000
