"""The profile of layer ranges."""

import pytest
from engine.served import ASK, SHORT, engine_of
from engine.test_selection import deep

from blocktune.evaluation.fidelity import profile_layers


@pytest.fixture(scope="module")
def engine(tokenizer):
    return engine_of(deep("llama"), tokenizer)


@pytest.fixture(scope="module")
def found(engine):
    return profile_layers(engine, [ASK, SHORT], batch_size=1)


def test_every_contiguous_range_is_tried(found):
    ranges = [(one.first_layer, one.num_layers) for one in found]
    assert ranges == [(f, n) for n in range(1, 5) for f in range(5 - n)]
    assert [one.ratio for one in found if one.first_layer == 0] == [0.25, 0.5, 0.75, 1.0]


def test_all_layers_are_a_full_prefill(found):
    whole = found[-1]
    assert (whole.first_layer, whole.num_layers, whole.agreement) == (0, 4, 1.0)
    assert abs(whole.divergence) < 1e-5
    assert all(one.divergence > 1e-3 for one in found[:-1])


def test_a_range_is_efficient_where_no_shorter_one_diverges_less(found):
    for one in found:
        rivals = [other.divergence for other in found if other.num_layers <= one.num_layers]
        assert one.efficient == (one.divergence == min(rivals))
    assert sum(one.efficient for one in found if one.num_layers == 1) == 1


def test_ranges_longer_than_asked_for_are_left_out(engine):
    found = profile_layers(engine, [SHORT], most_layers=1)
    assert [one.first_layer for one in found] == [0, 1, 2, 3]


@pytest.mark.parametrize(("examples", "most"), [([], 1), ([SHORT], 0), ([SHORT], 5)])
def test_what_cannot_be_profiled_is_refused(engine, examples, most):
    with pytest.raises(ValueError, match="needs examples and ranges of 1 to 4 layers; got"):
        profile_layers(engine, examples, most_layers=most)
