"""Selectors on literal tensors."""

import torch

from blocktune.layout import Layout
from blocktune.prompt import LayoutSpec, Pieces, lay_out
from blocktune.select import Everything, FirstK, KeyDeviation, Nothing, key_deviation, top_share

PIECES = Pieces(prefix=(1, 2), chunks=((3, 4, 5), (6, 7, 8, 9)), query=(10,))


def rows(pieces: Pieces = PIECES, **spec) -> Layout:
    return lay_out(pieces, LayoutSpec(**spec), link_base=100).layout


def chosen(selection, layout: Layout) -> list[int]:
    return selection.start(layout)[0].nonzero().squeeze(1).tolist()


def test_first_k_takes_the_opening_tokens_of_each_chunk():
    assert chosen(FirstK(k=2), rows()) == [2, 3, 5, 6]
    assert chosen(FirstK(k=2), rows(num_links=1)) == [2, 3, 6, 7]


def test_first_k_by_share_rounds_up_per_chunk():
    assert chosen(FirstK(share=0.5), rows()) == [2, 3, 5, 6]
    assert chosen(FirstK(share=0.0), rows()) == []
    assert chosen(FirstK(share=1.0), rows()) == chosen(Everything(), rows())


def test_a_chunk_that_opens_the_prompt_is_exact_and_never_selected():
    layout = rows(PIECES._replace(prefix=()))
    assert chosen(FirstK(k=1), layout) == [3]
    assert chosen(KeyDeviation(), layout) == [3, 4, 5, 6]


def test_nothing_selects_nothing():
    assert chosen(Nothing(), rows()) == []


def test_top_share_rounds_up_and_prefers_the_earlier_of_equals():
    scores = torch.tensor([[1.0, 5.0, 5.0, 0.0, 9.0]])
    eligible = torch.tensor([[True, True, True, True, False]])
    total = torch.tensor([4])
    assert top_share(scores, eligible, total, 0.25).tolist() == [[False, True, False, False, False]]
    assert top_share(scores, eligible, total, 0.26).tolist() == [[False, True, True, False, False]]
    assert top_share(scores, eligible, total, 0.0).sum() == 0
    assert top_share(scores, eligible, total, 1.0).tolist() == [[True, True, True, True, False]]


def test_top_share_of_a_twentieth_is_not_rounded_up_by_floating_point():
    scores = torch.arange(20.0)[None]
    assert top_share(scores, scores >= 0, torch.tensor([20]), 0.15).sum() == 3


def test_key_deviation_is_the_mean_distance_over_heads():
    cached = torch.zeros(1, 2, 1, 2)
    fresh = torch.tensor([[[[3.0, 4.0]], [[0.0, 1.0]]]])
    assert key_deviation(fresh, cached).tolist() == [[3.0]]
