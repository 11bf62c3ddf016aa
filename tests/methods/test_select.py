"""Selectors on literal tensors."""

import pytest
import torch

from blocktune.layout import Layout
from blocktune.methods.select import (
    SELECTORS,
    AttentionDeviation,
    AuxiliaryAttention,
    Deviation,
    Everything,
    FirstK,
    GradualDeviation,
    LayerCheck,
    LayerKV,
    LayerRange,
    Nothing,
    Oracle,
    QueryAttention,
    Random,
    Recency,
    Reselect,
    Truth,
    distance,
    matched,
    top_by_chunk,
    top_count,
    top_share,
)
from blocktune.prompt import LayoutSpec, Pieces, lay_out

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
    assert chosen(Deviation(), layout) == [3, 4, 5, 6]


def test_nothing_selects_nothing():
    assert chosen(Nothing(), rows()) == []


def test_the_best_of_each_chunk_are_those_of_the_chunk_alone():
    draw = torch.Generator().manual_seed(0)
    scores = torch.randint(4, (3, 40), generator=draw).float()  # with ties
    chunk = torch.randint(-1, 5, (3, 40), generator=draw)
    eligible = (chunk >= 0) & (scores != 2)
    for counted in (eligible, chunk >= 0):
        made = top_by_chunk(scores, eligible, chunk, counted, 0.3)
        for index in range(5):
            own, total = chunk == index, (counted & (chunk == index)).sum(1)
            assert torch.equal(made & own, top_share(scores, eligible & own, total, 0.3))
    shares = torch.where(chunk == 1, 1.0, 0.0)  # by chunk
    assert torch.equal(
        top_by_chunk(scores, eligible, chunk, eligible, shares), eligible & (chunk == 1)
    )


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


def test_distance_is_the_mean_over_heads_of_the_euclidean_or_squared_one():
    cached = torch.zeros(1, 2, 1, 2)
    fresh = torch.tensor([[[[3.0, 4.0]], [[0.0, 1.0]]]])
    assert distance(fresh, cached).tolist() == [[3.0]]
    assert distance(fresh, cached, squared=True).tolist() == [[13.0]]


def test_first_k_takes_both_ends():
    assert chosen(FirstK(k=1, last=1), rows()) == [2, 4, 5, 8]
    assert chosen(FirstK(share=0.5, last_share=0.5), rows()) == [2, 4, 5, 8]
    assert chosen(FirstK(share=0.5, last_share=1.0), rows()) == [3, 4, 7, 8]
    assert chosen(FirstK(k=9, last=9), rows()) == chosen(Everything(), rows())


def test_a_chunk_encoded_after_blanks_is_not_exact_where_it_opens_the_prompt():
    layout = lay_out(PIECES._replace(prefix=()), LayoutSpec(num_blanks=1), blank_id=99).layout
    orders = layout.order[Everything().start(layout)].tolist()
    assert layout.order[Deviation().start(layout)].tolist() == orders == [0, 1, 2, 3, 4, 5, 6]


def asked(layer: int, keys: list[float], values: list[float], num_layers=4, others=1) -> LayerCheck:
    """A check whose rows are context tokens that deviate by so much, then ``others``."""

    def states(numbers):
        return torch.tensor([*numbers, *[100.0] * others])[None, None, :, None]

    fresh = LayerKV(states(keys), states(values))
    cached = LayerKV(torch.zeros_like(fresh.keys), torch.zeros_like(fresh.values))
    eligible = torch.tensor([[True] * len(keys) + [False] * others])
    count = torch.tensor([len(keys)])
    return LayerCheck(
        layer=layer,
        num_layers=num_layers,
        eligible=eligible,
        context_tokens=count,
        cached_tokens=count + 3,  # a prefix of 3
        chunk=torch.where(eligible, 0, -1),
        question_mass=None,
        probe=lambda: (fresh, cached),
    )


def kept(selection, check: LayerCheck) -> list[int]:
    return selection.refine(check)[0].nonzero().squeeze(1).tolist()


def test_deviation_compares_what_it_is_told_to():
    check = asked(1, keys=[1, 4, 2, 3], values=[9, 1, 8, 7])
    assert kept(Deviation(ratio=0.5), check) == [1, 3]
    assert kept(Deviation(ratio=0.5, by="values"), check) == [0, 2]
    assert kept(Deviation(ratio=0.25, by="both"), check) == [0]


def test_deviation_counts_what_its_share_is_of():
    check = asked(1, keys=[1, 4, 2, 3], values=[0, 0, 0, 0], others=2)  # a prefix of 3 is cached
    assert kept(Deviation(ratio=0.3, of="context"), check) == [1, 3]  # 1.2, rounded up
    assert kept(Deviation(ratio=0.4, of="cached"), check) == [1, 3]  # 2.8, rounded down
    assert kept(Deviation(ratio=0.1, of="cached"), check) == []  # 0.7


def test_gradual_deviation_keeps_fewer_in_every_layer_and_its_ratio_on_average():
    selection = GradualDeviation(ratio=0.5, spread=0.4, check_layer=1)
    shares = [selection.share_at(layer, 6) for layer in selection.checks(6)]
    assert shares == sorted(shares, reverse=True)
    assert (shares[0], shares[-1]) == (0.7, 0.3)
    assert abs(sum(shares) / 5 - 0.5) < 1e-12
    assert kept(selection, asked(5, [4, 3, 2, 1], [0, 0, 0, 0], num_layers=6)) == [0, 1]


def test_a_layer_range_begins_from_stored_states_and_drops_everything_after_it():
    selection = LayerRange(first_layer=2, ratio=0.5)
    assert (selection.widens(8), selection.checks(8)) == ((2,), (6,))
    assert chosen(selection, rows()) == []
    assert kept(selection, asked(6, [1, 2], [1, 2])) == []
    assert LayerRange(first_layer=6, ratio=0.5).checks(8) == ()
    below = LayerRange(first_layer=0, ratio=0.25)
    assert (below.widens(8), below.checks(8)) == ((), (2,))
    assert chosen(below, rows()) == chosen(Everything(), rows())


def test_reselect_asks_again_one_layer_after_its_restart():
    selection = Reselect(ratio=0.5)
    assert (selection.checks(8), selection.widens(8), selection.min_layers) == ((1, 6), (5,), 7)
    assert kept(selection, asked(6, [1, 4, 2, 3], [0, 0, 0, 0])) == [1, 3]


def test_recency_takes_the_last_context_tokens():
    assert chosen(Recency(ratio=0.4), rows()) == [6, 7, 8]


def test_random_draws_by_seed_and_alike_in_any_batch():
    pieces = Pieces((1,), (tuple(range(40)), tuple(range(30))), (10,))
    alone = rows(pieces)
    draw = Random(ratio=0.2, seed=3).start(alone)[0]
    assert draw.sum() == 14
    assert not torch.equal(draw, Random(ratio=0.2, seed=4).start(alone)[0])
    longer = torch.nn.functional.pad(alone.pack(), (0, 0, 0, 5))
    assert torch.equal(Random(ratio=0.2, seed=3).start(Layout.unpack(longer))[0, :-5], draw)


class Told:
    """Passes whose scores are given: of the layout's rows, by name."""

    def __init__(self, **scores):
        self.scores = {name: torch.tensor(values) for name, values in scores.items()}

    def query_attention(self, how=None):
        return self.scores["query"]

    def auxiliary_attention(self, model):
        return self.scores[model]

    def outside_attention(self):
        return self.scores["outside"]

    def full_prefill(self):
        return Truth(*(self.scores[name] for name in ("keys", "values", "query")))


def begun(selection, **scores) -> list[int]:
    return selection.begin(rows(), Told(**scores))[0].nonzero().squeeze(1).tolist()


ONE = [[9.0, 9, 1, 2, 3, 4, 5, 6, 0, 9]]
OTHER = [[9.0, 9, 0, 0, 0, 0, 0, 0, 8, 9]]


def test_query_attention_fuses_layers_and_never_takes_prefix_or_question():
    scores = [ONE, OTHER]
    assert begun(QueryAttention(ratio=0.25), query=scores) == [7, 8]
    assert begun(QueryAttention(ratio=0.1, fuse="max"), query=scores) == [8]
    assert begun(QueryAttention(ratio=0.1, fuse="last"), query=scores) == [8]
    assert begun(QueryAttention(ratio=0.1), query=[ONE, ONE]) == [7]


def test_auxiliary_attention_takes_whole_windows_of_a_chunk():
    scores = [[0.0, 0, 9, 0, 5, 6, 6, 0, 1, 0]]  # windows of 2: 4.5, 5 (one token), 6, 0.5
    assert begun(AuxiliaryAttention(ratio=0.2, window=2, model="small"), small=scores) == [5, 6]
    assert begun(AuxiliaryAttention(ratio=0.3, window=2, model="small"), small=scores) == [4, 5, 6]
    assert begun(AuxiliaryAttention(ratio=1.0, window=2, model="small"), small=scores) == [
        2,
        3,
        4,
        5,
        6,
        7,
        8,
    ]
    assert begun(AuxiliaryAttention(ratio=0.0, window=2, model="small"), small=scores) == []


def test_attention_deviation_takes_what_looks_outside():
    assert begun(AttentionDeviation(ratio=0.25), outside=ONE) == [6, 7]


def test_the_oracle_reads_what_it_is_told_to():
    told = {"keys": [ONE], "values": [OTHER], "query": [ONE]}
    assert begun(Oracle(ratio=0.1, by="attention"), **told) == [7]
    assert begun(Oracle(ratio=0.1, by="deviation"), **told) == [8]
    told["values"] = [[[0.0, 0, 7, 0, 0, 0, 0, 0, 7, 0]]]
    assert begun(Oracle(ratio=0.1, by="influence"), **told) == [2]


def test_scored_selectors_cannot_be_used_without_a_model():
    with pytest.raises(ValueError, match="'query-attention' needs a forward pass"):
        QueryAttention().start(rows())


@pytest.mark.parametrize(
    "selection",
    [
        Deviation(check_layer=2),
        GradualDeviation(),
        FirstK(),
        Reselect(),
        QueryAttention(),
        AuxiliaryAttention(),
        AttentionDeviation(),
        Recency(),
        Random(),
        Oracle(),
    ],
)
def test_a_budget_of_layer_tokens_is_met(selection):
    assert matched(selection, 0.3, 12).spends(12) == pytest.approx(0.3)


def test_a_layer_range_meets_a_budget_of_whole_layers_and_refuses_one_between():
    assert matched(LayerRange(), 0.25, 12).spends(12) == 3 / 12
    with pytest.raises(ValueError, match=r"12 layers it spends 0.250 or 0.333, and nothing"):
        matched(LayerRange(), 0.3, 12)


def test_a_budget_below_what_the_first_layers_cost_is_refused():
    with pytest.raises(ValueError, match=r"0.05 of the layer-tokens cannot .* 0.083 to 1.000"):
        matched(Deviation(), 0.05, 12)


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("deviation", {"by": "queries"}, "by must be one of keys, values, both, got 'queries'"),
        ("deviation", {"of": "all"}, "of must be one of context, cached, got 'all'"),
        ("gradual-deviation", {"check_layer": 0}, "check_layer must be .* 1 .*got 0"),
        (
            "reselect",
            {"restart_layer": 1},
            "restart_layer must be .* 2 .*check layer.*, got 1",
        ),
        (
            "query-attention",
            {"fuse": "sum"},
            "fuse must be one of mean, max, first, last, each, got 'sum'",
        ),
        ("auxiliary-attention", {"window": 0}, "window must be .* at least 1, got 0"),
        ("oracle", {"by": "luck"}, "by must be one of influence, attention, deviation, got 'luck'"),
        ("first-k", {"last": -1}, "last must be .* at least 0, got -1"),
        ("recency", {"ratio": None}, "'ratio' must be a number, got None"),
        ("random", {"ratio": 15}, r"ratio must be a share .* \[0, 1\], got 15"),
    ],
)
def test_bad_values_are_refused(name, parameters, message):
    with pytest.raises(ValueError, match=message):
        SELECTORS.build(name, **parameters)


def test_no_token_is_chosen_that_may_not_be():
    eligible = torch.tensor([[False, True, False]])
    scores, count = torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([2])
    assert torch.equal(top_count(scores, eligible, count), eligible)
