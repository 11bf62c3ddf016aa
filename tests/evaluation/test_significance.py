"""Intervals, tests and power against closed forms and values worked by hand."""

import numpy as np
import pytest
from scipy.stats import binomtest

from blocktune.evaluation.significance import (
    FEW,
    NUM_FLIPS,
    Interval,
    comparisons,
    difference,
    holm,
    mcnemar_exact,
    mean_interval,
    p_value,
    power,
    recovered_gap,
    sign_flip,
)

UNKNOWN = {"detectable": None, "n_needed": None}


def scores(right: int, wrong: int) -> list[float]:
    return [1.0] * right + [0.0] * wrong


def test_a_proportion_has_wilsons_interval():
    found = mean_interval(scores(280, 120))
    known = binomtest(280, 400).proportion_ci(method="wilson")
    assert found == pytest.approx((0.7, known.low, known.high))


@pytest.mark.parametrize(("right", "wrong"), [(5, 0), (0, 5), (50, 0), (1, 0)])
def test_no_interval_has_zero_width(right, wrong):
    known = binomtest(right, right + wrong).proportion_ci(method="wilson")
    assert mean_interval(scores(right, wrong))[1:] == pytest.approx((known.low, known.high))
    mean, low, high = difference(scores(right, wrong), scores(right, wrong))
    assert mean == 0
    assert -low == high > 2 / (right + wrong + 2)  # about the rule of three
    mean, low, high = mean_interval([0.5] * (right + wrong))
    assert high - mean == pytest.approx(mean - low)
    assert low < 0.5


def test_scores_between_0_and_1_are_as_narrow_as_their_spread():
    rng = np.random.default_rng(1)
    own = rng.uniform(0.4, 0.6, 400)
    mean, low, high = mean_interval(own)
    half = 1.96 * own.std() / 20
    assert [low, high] == pytest.approx([mean - half, mean + half], abs=0.005)
    assert low < mean < high


def test_a_difference_has_bonett_and_prices_interval():
    # 12 wins and 4 losses of 40, by hand from the paper's counts plus one.
    left, right = scores(12, 4) + [1.0] * 24, [0.0] * 12 + [1.0] * 28
    centre = 8 / 42
    half = 1.959964 * np.sqrt((13 / 42 + 5 / 42 - centre**2) / 42)
    found = difference(left, right)
    assert found == pytest.approx((0.2, centre - half, centre + half), abs=1e-6)


def test_intervals_cover_what_they_promise():
    rng = np.random.default_rng(3)
    hits = {"mean": 0, "difference": 0, "share": 0, "graded": 0, "near 1": 0}
    for _ in range(1000):
        floor = rng.random(60) < 0.3
        ceiling = floor | (rng.random(60) < 0.6)
        half = np.where(rng.random(60) < 0.5, floor, ceiling)
        hits["mean"] += (f := mean_interval(half)).low <= 0.51 <= f.high
        hits["difference"] += (f := difference(ceiling, floor)).low <= 0.42 <= f.high
        hits["share"] += (f := recovered_gap(half, floor, ceiling)).low <= 0.5 <= f.high
        # F1 or ROUGE: few are exactly 0 or 1, and their mean may be near either.
        hits["graded"] += (f := mean_interval(rng.beta(1, 20, 500))).low <= 1 / 21 <= f.high
        hits["near 1"] += (f := mean_interval(rng.beta(20, 1, 500))).low <= 20 / 21 <= f.high
    assert all(0.93 <= count / 1000 <= 0.99 for count in hits.values()), hits


def test_many_small_differences_do_not_make_few_large_ones_normal():
    """Four questions decide, with probability 1/8 all for one method; a normal sum has 0.05."""
    differences = np.array([0.5] * 4 + [-1e-6] * 60)
    assert sign_flip(differences, np.zeros(64)) == pytest.approx(1 / 8, abs=0.01)


def test_a_paired_difference_is_narrower_than_two_intervals():
    rng = np.random.default_rng(0)
    base = rng.random(200)
    better = base + 0.05 + 0.01 * rng.standard_normal(200)
    above, alone = difference(better, base), mean_interval(better)
    assert above.low > 0
    assert above.high - above.low < 0.4 * (alone.high - alone.low)


def test_the_recovered_gap_is_the_share_of_the_means():
    floor, half, ceiling = scores(50, 50), scores(70, 30), scores(90, 10)
    share = recovered_gap(half, floor, ceiling)
    assert share.mean == pytest.approx(0.5)
    assert 0.3 < share.low < 0.5 < share.high < 0.7
    assert recovered_gap(ceiling, floor, ceiling) == Interval(1, 1, 1)
    assert recovered_gap(floor, floor, ceiling) == Interval(0, 0, 0)


def test_no_gap_recovers_nothing():
    even, odd = [1.0, 0.0] * 20, [0.0, 1.0] * 20
    assert recovered_gap(even, even, odd) is None


@pytest.mark.parametrize(
    ("wins", "losses", "p_value"),
    [(0, 0, 1.0), (5, 5, 1.0), (6, 0, 2 / 64), (1, 8, 2 * 10 / 512), (3, 9, 2 * 299 / 4096)],
)
def test_mcnemar_matches_the_binomial_by_hand(wins, losses, p_value):
    left = [1] * wins + [0] * losses + [1] * 7
    right = [0] * wins + [1] * losses + [1] * 7
    assert mcnemar_exact(left, right) == pytest.approx(p_value)


def test_mcnemar_of_many_questions_is_exact():
    wins, losses = 10_300, 9_700
    p = mcnemar_exact([1] * wins + [0] * losses, [0] * wins + [1] * losses)
    assert p == pytest.approx(binomtest(wins, wins + losses).pvalue, rel=1e-9)


def test_unpaired_scores_are_refused():
    with pytest.raises(ValueError, match="one length"):
        mcnemar_exact([1, 0], [1])
    with pytest.raises(ValueError, match="one length"):
        recovered_gap([1], [0] * 9, [1] * 9)
    with pytest.raises(ValueError, match="at least one question"):
        mean_interval([])


def test_few_differences_flip_as_all_sign_patterns_do():
    # Four differences of one sign: of 16 patterns, the two of one sign are as extreme.
    assert sign_flip([1.5, 2, 1, 3], [1, 1, 0.5, 2]) == pytest.approx(2 / 16, abs=0.015)
    assert sign_flip([1, 2], [1, 2]) == 1.0
    assert sign_flip([1, 0], [0, 1]) == 1.0


def test_a_p_value_of_drawn_signs_is_never_0():
    """The observed signs are among the draws, or 10,000 others would prove anything."""
    assert sign_flip([0.9] * 40, [0.1] * 40) == 1 / (NUM_FLIPS + 1)


def test_many_differences_have_the_normal_tail_of_their_signs():
    differences = np.array([1.0] * 60 + [-1.0] * 40)
    assert len(differences) > FEW
    z = 20 / np.sqrt(100)  # sum over the root of the sum of squares
    assert sign_flip(differences, np.zeros(100)) == pytest.approx(0.0455, abs=1e-4)
    assert z == 2


def test_holm_matches_its_paper_by_hand():
    # Sorted .01 .02 .03 .04 times 4 3 2 1, each at least the one before.
    p = {"a": 0.03, "b": 0.01, "c": 0.04, "d": 0.02}
    expected = {"a": 0.06, "b": 0.04, "c": 0.06, "d": 0.06}
    assert holm(p) == pytest.approx(expected)
    assert list(holm(p)) == list(p)
    assert holm({"a": 0.7, "b": 0.6}) == {"a": 1.0, "b": 1.0}


def test_the_questions_needed_show_the_difference_that_is_there():
    rng = np.random.default_rng(0)
    base = rng.random(400)
    better = base + rng.normal(0.02, 0.2, 400)
    found = power(better, base)
    spread, mean = np.std(better - base, ddof=1), abs(np.mean(better - base))
    assert found["detectable"] == pytest.approx((1.959964 + 0.841621) * spread / 20, rel=1e-5)
    assert found["n_needed"] == np.ceil(((1.959964 + 0.841621) * spread / mean) ** 2)
    drawn = rng.normal(mean, spread, (2000, found["n_needed"])).mean(1)
    hits = drawn / (spread / np.sqrt(found["n_needed"])) > 1.959964
    assert hits.mean() == pytest.approx(0.8, abs=0.03)


def test_differences_in_the_last_bit_are_ties():
    assert p_value([0.1 + 0.2] * 10, [0.3] * 10) == 1
    assert power([0.5] * 60, [0.4] * 60) == UNKNOWN


def test_power_knows_nothing_without_spread():
    assert power([1, 1], [0, 0]) == power([1], [0]) == UNKNOWN
    assert power([1, 0], [0, 1])["n_needed"] is None


def test_power_agrees_with_the_corrected_verdict():
    """What Holm's correction leaves within chance needs more questions than there are."""
    pair = scores(16, 24), scores(9, 31)  # 7 wins of 40, no loss: p = 0.016 alone
    found = comparisons({"clear": pair} | dict.fromkeys(range(6), pair))["clear"]
    assert found["p"] < 0.05 < found["p_holm"] == 7 * found["p"]
    assert found["n_needed"] > 40
    assert found["detectable"] > power(*pair)["detectable"]


def test_of_many_comparisons_those_without_any_difference_need_most():
    """Holm's p of 1 is cut off: p over it would be a level above that of clearer differences."""
    pair = scores(10, 30), scores(9, 31)  # p = 1 alone
    found = comparisons(dict.fromkeys(range(20), pair))[0]
    least = power(*pair, 0.05 / 10)
    assert found["p_holm"] == 1
    assert found["detectable"] > least["detectable"]
    assert found["n_needed"] > least["n_needed"]
