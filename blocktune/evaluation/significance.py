"""Statistics of scores: confidence intervals in closed form, significance tests, power.

The sampling units are questions, with scores in [0, 1]. No interval has zero width: a method that
is right on all of a few questions may be wrong on the next one, which a bootstrap would miss.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from math import ceil, erfc, sqrt
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

ALPHA = 0.05  # two-sided significance level of tests and intervals
Z = NormalDist().inv_cdf(1 - ALPHA / 2)
WANTED = 0.8  # power: probability to find a real difference
NUM_FLIPS = 10_000  # number of random sign assignments of the sign-flip test
FEW = 50  # the test draws signs for up to this many differences


class Interval(NamedTuple):
    """A mean with the bounds of its 95 % confidence interval."""

    mean: float
    low: float
    high: float

    @property
    def ci95(self) -> list[float]:
        """The two bounds as a list."""
        return [self.low, self.high]


def mean_interval(own: ArrayLike) -> Interval:
    """The mean of scores ``(n,)`` with Wilson's interval. Raises ValueError if there is none.

    Scores in between, such as F1, vary less than 0 and 1: the interval is that of the larger number
    of questions at which a proportion would have the variance of this mean. The ratio of the
    variances is estimated with one more question of ratio 1, so that equal scores keep a width.

    Source: Wilson, Probable Inference (1927); with an effective number: Korn and Graubard,
    Confidence Intervals for Proportions with Small Expected Number of Positive Counts (1998).
    """
    own, z2 = np.asarray(own, dtype=np.float64), Z**2
    if not len(own):
        raise ValueError("a mean needs the score of at least one question, got none")
    n, mean = len(own), float(own.mean())
    if (binary := mean * (1 - mean)) > 0:
        n *= (n + 1) * binary / (n * float(own.var()) + binary)
    centre = (n * mean + z2 / 2) / (n + z2)
    half = Z / (n + z2) * sqrt(n * binary + z2 / 4)
    return Interval(mean, max(0.0, centre - half), min(1.0, centre + half))


def difference(own: ArrayLike, other: ArrayLike) -> Interval:
    """Mean of ``own`` minus mean of ``other``, scores ``(n,)`` on the same questions.

    The adjusted Wald interval: it adds two questions, one won by each method with difference 1.

    Source: Bonett and Price, Adjusted Wald Confidence Interval for a Difference of Binomial
    Proportions Based on Paired Data (2012), generalised from counts to differences.
    """
    gains = paired(own, other)
    n, centre = len(gains) + 2, float(gains.sum()) / (len(gains) + 2)
    half = Z * sqrt((float((gains**2).sum()) + 2) / n - centre**2) / sqrt(n)
    return Interval(float(gains.mean()), max(-1.0, centre - half), min(1.0, centre + half))


def recovered_gap(own: ArrayLike, floor: ArrayLike, ceiling: ArrayLike) -> Interval | None:
    """``(own - floor) / (ceiling - floor)``: the share of a gap that a method closes.

    The interval contains each share ``s`` for which the mean of ``(own - floor) - s (ceiling -
    floor)`` may be 0, as in `difference`. Floor and ceiling give exactly 0 and 1. Returns None if
    the interval of the gap itself reaches 0.

    Source: Fieller, Some Problems in Interval Estimation (1954).
    """
    if difference(ceiling, floor).low <= 0:
        return None
    if own is floor or own is ceiling:
        return Interval(*[float(own is ceiling)] * 3)
    part, whole = paired(own, floor), paired(ceiling, floor)
    n, z2 = len(part) + 2, Z**2
    # |sum(part - s whole)|^2 (1 + z^2 / n) <= z^2 (sum((part - s whole)^2) + 2), solved for s.
    k = 1 + z2 / n
    a = float(k * whole.sum() ** 2 - z2 * (whole @ whole))
    b = float(k * part.sum() * whole.sum() - z2 * (part @ whole))
    c = float(k * part.sum() ** 2 - z2 * (part @ part + 2))
    root = sqrt(b**2 - a * c)
    return Interval(float(part.sum() / whole.sum()), (b - root) / a, (b + root) / a)


def p_value(own: ArrayLike, other: ArrayLike, *, seed: int = 0) -> float:
    """p-value of McNemar's exact test if all scores are 0 or 1, else of `sign_flip`."""
    binary = {*np.unique(own), *np.unique(other)} <= {0.0, 1.0}
    return mcnemar_exact(own, other) if binary else sign_flip(own, other, seed=seed)


def mcnemar_exact(correct: ArrayLike, baseline: ArrayLike) -> float:
    """Two-sided exact p-value of the hypothesis that two methods are right equally often.

    Only questions on which they disagree count. Both arguments are ``(n,)``, 0 and 1 or booleans.
    Source: McNemar (1947), in the exact binomial form.
    """
    differences = paired(correct, baseline)
    wins, losses = int((differences > 0).sum()), int((differences < 0).sum())
    tail, term, n = 0, 1, wins + losses
    for k in range(min(wins, losses) + 1):  # term: n over k; `comb` for each k takes cubic time
        tail, term = tail + term, term * (n - k) // (k + 1)
    return min(1.0, 2 * tail / 2**n)


def sign_flip(own: ArrayLike, other: ArrayLike, *, seed: int = 0) -> float:
    """Two-sided p-value of the hypothesis that two methods score equally, for any scores.

    For up to `FEW` differences, random signs are drawn by ``seed``; the observed signs count as one
    draw, so p is never 0. For more, the sum is taken as normal, with the variance under random
    signs. Small differences hardly count: their number is ``sum(d^2)^2 / sum(d^4)``.

    Source: Noreen, Computer-Intensive Methods for Testing Hypotheses (1989), approximate
    randomisation; Fisher's paired test.
    """
    differences = paired(own, other)
    differences = differences[differences != 0]
    if not len(differences):
        return 1.0
    observed, squares = abs(differences.sum()), differences**2
    if squares.sum() ** 2 > FEW * (squares**2).sum():
        z = observed / np.sqrt(squares.sum())
        return erfc(float(z) / sqrt(2))  # 0 only if the tail is below 1e-300
    least, draws = observed - 1e-12 * np.abs(differences).sum(), np.random.default_rng(seed)
    size = NUM_FLIPS // 10, len(differences)  # in ten parts, to save memory
    sums = [draws.choice((-1.0, 1.0), size) @ differences for _ in range(10)]
    extreme = int((np.abs(sums) >= least).sum())
    return (extreme + 1) / (NUM_FLIPS + 1)


def holm(p_values: Mapping[Hashable, float]) -> dict[Hashable, float]:
    """p-values that control the family-wise error rate, by Holm's step-down procedure (1979)."""
    adjusted, highest = dict(p_values), 0.0
    for rank, name in enumerate(sorted(p_values, key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = highest
    return adjusted


def comparisons(
    pairs: Mapping[Hashable, tuple[ArrayLike, ArrayLike]], seed: int = 0
) -> dict[Hashable, dict[str, Any]]:
    """Tests all differences ``own`` minus ``other``, with Holm's correction: `difference`, `power`.

    Each has ``mean``, ``ci95``, ``p``, ``p_holm``, and ``detectable`` and ``n_needed`` (or None).
    """
    tests = {name: p_value(own, other, seed=seed) for name, (own, other) in pairs.items()}
    found, adjusted = {}, holm(tests)
    for name, (own, other) in pairs.items():
        p, p_holm, gain = tests[name], adjusted[name], difference(own, other)
        # Significant is a Holm's p below `ALPHA`: the level that the correction leaves decides, or
        # differences that are within chance could need no more questions. A p of 1 is cut off.
        left = ALPHA * (p / p_holm if 0 < p_holm < 1 else 1 / len(tests))
        found[name] = {"mean": gain.mean, "ci95": gain.ci95, "p": p, "p_holm": p_holm}
        found[name] |= power(own, other, left)
    return found


def power(own: ArrayLike, other: ArrayLike, alpha: float = ALPHA) -> dict[str, Any]:
    """The difference that is ``detectable`` at level ``alpha`` with probability `WANTED`.

    ``n_needed``: questions to show the one that is there, if any. By the normal approximation; both
    are None if all differences are equal, since the spread is unknown.

    Source: the sample size of a paired z-test, e.g. Cohen, Statistical Power Analysis (1988).
    """
    differences = paired(own, other)
    if len(set(differences)) < 2:
        return {"detectable": None, "n_needed": None}
    spread = float(differences.std(ddof=1))
    reach = (NormalDist().inv_cdf(1 - alpha / 2) + NormalDist().inv_cdf(WANTED)) * spread
    mean = abs(float(differences.mean()))
    needed = ceil((reach / mean) ** 2) if mean > 0 else None
    return {"detectable": reach / len(differences) ** 0.5, "n_needed": needed}


def paired(left: ArrayLike, right: ArrayLike) -> NDArray[np.float64]:
    """Left minus right score of each question, ``(n,)``; ValueError if the lengths differ."""
    first, second = np.asarray(left, dtype=np.float64), np.asarray(right, dtype=np.float64)
    if first.shape != second.shape or first.ndim != 1:
        shapes = f"{first.shape} and {second.shape}"
        raise ValueError(f"paired scores must be two lists of one length, got {shapes}")
    return np.round(first - second, 12)  # equal means of seeds may differ in the last bits
