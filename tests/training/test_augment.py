"""Layouts that vary: literal rows, seeded draws, and what stays as it was."""

from random import Random

import pytest
import torch

from blocktune.attention import dense_mask
from blocktune.layout import GLOBAL
from blocktune.prompt import LayoutSpec, Pieces, lay_out
from blocktune.training.collator import Augmentation
from blocktune.training.order import draw_of

PIECES = Pieces(prefix=(1, 2), chunks=((3, 4), (5,), (6, 7)), query=(8,), answer=(9,))


def varied(draw, spec=None, **options):
    layout = lay_out(PIECES, spec or LayoutSpec(), link_base=100).layout
    return Augmentation(**options).vary(layout, draw)


def test_nothing_asked_changes_nothing():
    layout = lay_out(PIECES, LayoutSpec()).layout
    assert torch.equal(varied(Random(0)).pack(), layout.pack())


def test_a_chunk_that_joins_sees_the_one_before_it_and_not_the_reverse():
    layout = varied(Random(0), LayoutSpec(num_links=1), block_dropout=1.0)
    assert layout.group[0].tolist() == [GLOBAL] * 2 + [0, 0, -1, 0, -1, 0, 0, -1, -1, -1]
    seen = dense_mask(layout)[0, 0]
    assert seen[7].nonzero()[:, 0].tolist() == [2, 3, 5, 7]  # the third chunk's first token
    assert seen[2].nonzero()[:, 0].tolist() == [2]


def test_dropout_is_a_chance_of_each_seam():
    groups = [tuple(varied(Random(s), block_dropout=0.5).group[0].tolist()) for s in range(60)]
    assert len(set(groups)) == 4  # two seams, joined or not


def test_gaps_add_up_and_spare_the_prefix():
    layout = varied(Random(3), LayoutSpec(num_links=1), position_jitter=5)
    base = lay_out(PIECES, LayoutSpec(num_links=1), link_base=100).layout
    moved = (layout.position - base.position)[0].tolist()
    first, second, third = moved[2], moved[5], moved[7]
    assert moved[:2] == [0, 0]
    assert moved[2:5] == [first] * 3
    assert first <= second <= third <= moved[-1]
    assert moved[5:7] == [second] * 2
    assert moved[-2:] == [moved[-1]] * 2
    assert 0 < moved[-1] <= 4 * 5
    assert torch.equal(layout.order, base.order)


def test_draws_depend_on_seed_epoch_and_example_alone():
    one = draw_of(1, 2, 3, True).random()
    assert one == draw_of(1, 2, 3, True).random()
    others = [draw_of(0, 2, 3, True), draw_of(1, 0, 3, True), draw_of(1, 2, 0, True)]
    assert one not in [other.random() for other in others]


@pytest.mark.parametrize("values", [{"block_dropout": 1.2}, {"position_jitter": -1}])
def test_values_out_of_range_are_refused(values):
    with pytest.raises(ValueError, match=f"{next(iter(values))} must be"):
        Augmentation(**values)
