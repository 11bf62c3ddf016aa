"""Tests of differences against values worked by hand or taken from closed forms."""

import numpy as np
import pytest

from blocktune.evaluation.statistics import FEW, holm, pooled, power, sign_flip


def test_few_differences_flip_as_all_sign_patterns_do():
    # Four differences of one sign: of 16 patterns, the two of one sign are as extreme.
    assert sign_flip([1.5, 2, 1, 3], [1, 1, 0.5, 2]) == pytest.approx(2 / 16, abs=0.015)
    assert sign_flip([1, 2], [1, 2]) == 1.0
    assert sign_flip([1, 0], [0, 1]) == 1.0


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
    assert found.detectable == pytest.approx((1.959964 + 0.841621) * spread / 20, rel=1e-5)
    assert found.num_needed == np.ceil(((1.959964 + 0.841621) * spread / mean) ** 2)
    drawn = rng.normal(mean, spread, (2000, found.num_needed)).mean(1)
    hits = drawn / (spread / np.sqrt(found.num_needed)) > 1.959964
    assert hits.mean() == pytest.approx(0.8, abs=0.03)


def test_power_knows_nothing_without_spread():
    assert power([1, 1], [0, 0]) is None
    assert power([1], [0]) is None
    assert power([1, 0], [0, 1]).num_needed is None


def test_seeds_are_averaged_before_questions_are_counted():
    assert pooled([[1, 0, 1], [0, 0, 1]]).tolist() == [0.5, 0, 1]
    with pytest.raises(ValueError, match=r"same questions, got \[1, 2\]"):
        pooled([[1], [1, 0]])
