"""Bootstrap and McNemar against closed forms."""

import numpy as np
import pytest

from blocktune.evaluation.statistics import (
    difference_interval,
    mcnemar_exact,
    mean_interval,
    recovered_gap,
    resampled_means,
)


def test_bootstrap_interval_matches_the_normal_approximation():
    scores = np.repeat([0.0, 1.0], [120, 280])  # p = 0.7, n = 400
    mean, low, high = mean_interval(scores)
    half_width = 1.96 * np.sqrt(0.7 * 0.3 / 400)
    assert mean == pytest.approx(0.7)
    # The sampling error of a 2.5 % quantile over 10,000 draws is about 2 % of the half width.
    assert [low, high] == pytest.approx([0.7 - half_width, 0.7 + half_width], abs=0.004)


def test_equal_seeds_give_equal_draws_and_others_do_not():
    scores = np.random.default_rng(1).random(30)
    assert mean_interval(scores, seed=3) == mean_interval(scores, seed=3)
    assert mean_interval(scores, seed=3) != mean_interval(scores, seed=4)


def test_methods_share_each_draw():
    scores = np.random.default_rng(1).random(25)
    means = resampled_means(np.stack([scores, scores + 0.5]), num_resamples=700)
    np.testing.assert_allclose(means[1] - means[0], 0.5)


def test_a_constant_difference_has_no_width():
    scores = np.random.default_rng(2).random(40)
    assert difference_interval(scores + 0.25, scores) == pytest.approx((0.25, 0.25, 0.25))


def test_a_paired_difference_is_narrower_than_two_intervals():
    rng = np.random.default_rng(0)
    base = rng.random(200)
    better = base + 0.05 + 0.01 * rng.standard_normal(200)
    paired, alone = difference_interval(better, base), mean_interval(better)
    assert paired.low > 0
    assert paired.high - paired.low < 0.1 * (alone.high - alone.low)


def test_recovered_gap_is_the_share_of_the_means():
    floor, ceiling = np.repeat([1.0, 0.0], [50, 50]), np.repeat([1.0, 0.0], [90, 10])
    halfway = np.repeat([1.0, 0.0], [70, 30])
    share = recovered_gap(halfway, floor, ceiling)
    assert share.mean == pytest.approx(0.5)
    assert 0.3 < share.low < 0.5 < share.high < 0.7
    assert recovered_gap(ceiling, floor, ceiling) == pytest.approx((1, 1, 1))


def test_no_gap_recovers_nothing():
    even, odd = np.tile([1.0, 0.0], 20), np.tile([0.0, 1.0], 20)
    assert recovered_gap(even, even, odd) is None


@pytest.mark.parametrize(
    ("wins", "losses", "p_value"),
    [(0, 0, 1.0), (5, 5, 1.0), (6, 0, 2 / 64), (1, 8, 2 * 10 / 512), (3, 9, 2 * 299 / 4096)],
)
def test_mcnemar_matches_the_binomial_by_hand(wins, losses, p_value):
    left = [1] * wins + [0] * losses + [1] * 7
    right = [0] * wins + [1] * losses + [1] * 7
    assert mcnemar_exact(left, right) == pytest.approx(p_value)


@pytest.mark.parametrize("call", [difference_interval, mcnemar_exact])
def test_unpaired_scores_are_refused(call):
    with pytest.raises(ValueError, match="one length"):
        call([1, 0], [1])


def test_no_question_is_refused():
    with pytest.raises(ValueError, match="questions >= 1"):
        mean_interval([])
