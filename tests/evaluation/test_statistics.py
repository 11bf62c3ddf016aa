"""Bootstrap and McNemar against closed forms."""

import numpy as np
import pytest

from blocktune.evaluation.statistics import Interval, PairedBootstrap, mcnemar_exact


def scores(right: int, wrong: int) -> list[float]:
    return [1.0] * right + [0.0] * wrong


def test_the_interval_matches_the_normal_approximation():
    mean, low, high = PairedBootstrap({"a": scores(280, 120)}).mean("a")
    half_width = 1.96 * np.sqrt(0.7 * 0.3 / 400)
    assert mean == pytest.approx(0.7)
    # The sampling error of a 2.5 % quantile over 10,000 draws is about 2 % of the half width.
    assert [low, high] == pytest.approx([0.7 - half_width, 0.7 + half_width], abs=0.004)


def test_equal_seeds_give_equal_draws_and_others_do_not():
    values = {"a": np.random.default_rng(1).random(30)}
    means = [PairedBootstrap(values, seed=seed).mean("a") for seed in (3, 3, 4)]
    assert means[0] == means[1] != means[2]


def test_a_constant_difference_has_no_width():
    values = np.random.default_rng(2).random(40)
    bootstrap = PairedBootstrap({"a": values + 0.25, "b": values}, num_resamples=700)
    assert bootstrap.difference("a", "b") == pytest.approx((0.25, 0.25, 0.25))


def test_a_paired_difference_is_narrower_than_two_intervals():
    rng = np.random.default_rng(0)
    base = rng.random(200)
    better = base + 0.05 + 0.01 * rng.standard_normal(200)
    bootstrap = PairedBootstrap({"better": better, "base": base})
    paired, alone = bootstrap.difference("better", "base"), bootstrap.mean("better")
    assert paired.low > 0
    assert paired.high - paired.low < 0.1 * (alone.high - alone.low)


def test_the_recovered_gap_is_the_share_of_the_means():
    names = {"floor": scores(50, 50), "half": scores(70, 30), "ceiling": scores(90, 10)}
    bootstrap = PairedBootstrap(names)
    share = bootstrap.recovered_gap("half", "floor", "ceiling")
    assert share.mean == pytest.approx(0.5)
    assert 0.3 < share.low < 0.5 < share.high < 0.7
    assert bootstrap.recovered_gap("ceiling", "floor", "ceiling") == Interval(1, 1, 1)
    assert bootstrap.recovered_gap("floor", "floor", "ceiling") == Interval(0, 0, 0)


def test_no_gap_recovers_nothing():
    bootstrap = PairedBootstrap({"even": [1.0, 0.0] * 20, "odd": [0.0, 1.0] * 20})
    assert bootstrap.recovered_gap("even", "even", "odd") is None


@pytest.mark.parametrize(
    ("wins", "losses", "p_value"),
    [(0, 0, 1.0), (5, 5, 1.0), (6, 0, 2 / 64), (1, 8, 2 * 10 / 512), (3, 9, 2 * 299 / 4096)],
)
def test_mcnemar_matches_the_binomial_by_hand(wins, losses, p_value):
    left = [1] * wins + [0] * losses + [1] * 7
    right = [0] * wins + [1] * losses + [1] * 7
    assert mcnemar_exact(left, right) == pytest.approx(p_value)


def test_unpaired_scores_are_refused():
    with pytest.raises(ValueError, match="one length"):
        mcnemar_exact([1, 0], [1])
    with pytest.raises(ValueError, match=r"1 or more, got \{'a': 1, 'b': 2"):
        PairedBootstrap({"a": [1], "b": [1, 0]})
    with pytest.raises(ValueError, match="one number of questions"):
        PairedBootstrap({"a": []})
