"""How sure a score or a difference is: paired bootstrap intervals, exact tests, power."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from math import ceil, comb, erfc, sqrt
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

NUM_RESAMPLES = 10_000
_BLOCK = 500  # resamples drawn at a time: bounds the memory at any number of questions


class Interval(NamedTuple):
    """A mean with the bounds of its interval."""

    mean: float
    low: float
    high: float


class PairedBootstrap:
    """Scores of several methods on the same questions, resampled once for all.

    Intervals are percentile intervals. Where all scores are equal an interval has no width:
    resampling cannot know the unseen.

    Args:
        scores: Method -> one score per question, ``(n,)``, n at least 1, in the same order.
        seed: Equal seeds give equal draws.
        num_resamples: How often questions are drawn, with replacement.
        confidence: Coverage in (0, 1).

    Raises:
        ValueError: If there is no question, or methods differ in their number.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13; paired as
    in Koehn, Statistical Significance Tests for Machine Translation Evaluation (2004).
    """

    def __init__(
        self,
        scores: Mapping[Hashable, ArrayLike],
        *,
        seed: int = 0,
        num_resamples: int = NUM_RESAMPLES,
        confidence: float = 0.95,
    ):
        if not 0 < confidence < 1:
            raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
        counts = {name: len(values) for name, values in scores.items()}
        if len(set(counts.values())) != 1 or 0 in counts.values():
            raise ValueError(f"paired scores need one number of questions, 1 or more, got {counts}")
        table = np.stack([np.asarray(values, dtype=np.float64) for values in scores.values()])
        means = resampled_means(table, num_resamples=num_resamples, seed=seed)
        self._confidence = confidence
        self._means = dict(zip(scores, table.mean(axis=1).tolist(), strict=True))
        self._resampled = dict(zip(scores, means, strict=True))

    def mean(self, name: Hashable) -> Interval:
        """A method's mean."""
        return self._interval(self._means[name], self._resampled[name])

    def difference(self, name: Hashable, other: Hashable) -> Interval:
        """How much the first mean is above the second, on the same questions."""
        drawn = self._resampled[name] - self._resampled[other]
        return self._interval(self._means[name] - self._means[other], drawn)

    def recovered_gap(self, name: Hashable, floor: Hashable, ceiling: Hashable) -> Interval | None:
        """``(name - floor) / (ceiling - floor)``: the share of a gap that a method closes.

        Returns:
            None where the interval of the gap itself reaches zero: a share of nothing says
            nothing.
        """
        if self.difference(ceiling, floor).low <= 0:
            return None
        gap = self._resampled[ceiling] - self._resampled[floor]
        part = self._resampled[name] - self._resampled[floor]
        share = self.difference(name, floor).mean / self.difference(ceiling, floor).mean
        return self._interval(share, part[gap > 0] / gap[gap > 0])

    def _interval(self, mean: float, drawn: NDArray[np.float64]) -> Interval:
        tail = (1 - self._confidence) / 2
        low, high = np.quantile(drawn, [tail, 1 - tail]).tolist()
        return Interval(mean, low, high)


def resampled_means(
    scores: NDArray[np.float64], *, num_resamples: int, seed: int
) -> NDArray[np.float64]:
    """Means over questions drawn with replacement, the same draw for every method.

    Args:
        scores: Scores per method and question, ``(M, n)``.
        num_resamples: How many draws.
        seed: Of the draws.

    Returns:
        Means, ``(M, num_resamples)``.
    """
    rng, n = np.random.default_rng(seed), scores.shape[1]
    means = np.empty((len(scores), num_resamples))
    for start in range(0, num_resamples, _BLOCK):
        stop = min(start + _BLOCK, num_resamples)
        means[:, start:stop] = scores @ _draw(rng, stop - start, n).T
    return means / n


def mcnemar_exact(correct: ArrayLike, baseline: ArrayLike) -> float:
    """Two-sided exact p-value that two methods are right equally often.

    Only questions on which they disagree count: under the null hypothesis each falls to either
    side with probability 1/2.

    Args:
        correct: Whether one method is right, ``(n,)``, booleans or 0 and 1.
        baseline: The same for the other.

    Source: McNemar (1947), in the exact binomial form.
    """
    left, right = paired(correct, baseline)
    wins, losses = int((left > right).sum()), int((left < right).sum())
    if wins + losses == 0:
        return 1.0
    tail = sum(comb(wins + losses, k) for k in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / 2 ** (wins + losses))


def _draw(rng: np.random.Generator, num_draws: int, n: int) -> NDArray[np.float64]:
    """How often each of ``n`` questions is drawn in each draw of ``n``, ``(num_draws, n)``."""
    picked = rng.integers(n, size=(num_draws, n)) + n * np.arange(num_draws)[:, None]
    return np.bincount(picked.ravel(), minlength=num_draws * n).reshape(num_draws, n).astype(float)


def paired(left: ArrayLike, right: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Two lists of scores of the same questions as arrays, ``(n,)`` each.

    Raises:
        ValueError: If they differ in length.
    """
    first, second = np.asarray(left, dtype=np.float64), np.asarray(right, dtype=np.float64)
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(
            f"paired scores must be two lists of one length, got {first.shape} and {second.shape}"
        )
    return first, second


NUM_FLIPS = 10_000
FEW = 50
"""Differences up to which signs are drawn."""


class Power(NamedTuple):
    """What a number of questions can show of one paired difference.

    Attributes:
        detectable: Smallest difference that this many questions show, with the given power.
        num_needed: Questions that would show the observed difference; None where it is 0.
    """

    detectable: float
    num_needed: int | None


def sign_flip(own: ArrayLike, other: ArrayLike, *, seed: int = 0) -> float:
    """Two-sided p-value that two methods score equally, for scores that are not 0 or 1.

    Under the null hypothesis each question's difference is as likely with the other sign. Up to
    `FEW` of them the signs are drawn at random, the observed ones among the draws, so that p is
    never 0; beyond, their sum is normal with the variance that signs alone give it.

    Args:
        own: One method's scores, ``(n,)``.
        other: The other's on the same questions.
        seed: Of the draws.

    Source: Noreen, Computer-Intensive Methods for Testing Hypotheses (1989), approximate
    randomisation; Fisher's paired test.
    """
    left, right = paired(own, other)
    differences = left - right
    differences = differences[differences != 0]
    if not len(differences):
        return 1.0
    observed = abs(differences.sum())
    if len(differences) > FEW:
        z = observed / np.sqrt((differences**2).sum())
        return erfc(float(z) / sqrt(2))  # 0 only where the tail is below 1e-300
    rounding = 1e-12 * np.abs(differences).sum()
    signs = np.random.default_rng(seed).choice((-1.0, 1.0), size=(NUM_FLIPS, len(differences)))
    extreme = int((np.abs(signs @ differences) >= observed - rounding).sum())
    return (extreme + 1) / (NUM_FLIPS + 1)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """p-values adjusted for being read together: the chance of any false alarm stays below each.

    Args:
        p_values: Of one family of comparisons, by name.

    Source: Holm, A Simple Sequentially Rejective Multiple Test Procedure (1979).
    """
    adjusted: dict[str, float] = {}
    highest = 0.0
    ranked = sorted(p_values, key=p_values.__getitem__)
    for rank, name in enumerate(ranked):
        highest = max(highest, min(1.0, (len(ranked) - rank) * p_values[name]))
        adjusted[name] = highest
    return {name: adjusted[name] for name in p_values}


def power(
    own: ArrayLike, other: ArrayLike, *, alpha: float = 0.05, wanted: float = 0.8
) -> Power | None:
    """Whether this many questions can show a difference, by the normal approximation.

    Args:
        own: One method's scores, ``(n,)``.
        other: The other's on the same questions.
        alpha: Two-sided error of the first kind.
        wanted: Chance to find a difference that is there.

    Returns:
        None where two questions are not there or all differences are equal: nothing is known of
        their spread.

    Source: the sample size of a paired z-test, e.g. Cohen, Statistical Power Analysis (1988).
    """
    left, right = paired(own, other)
    differences = left - right
    spread = _spread(differences)
    if spread == 0:
        return None
    reach = (NormalDist().inv_cdf(1 - alpha / 2) + NormalDist().inv_cdf(wanted)) * spread
    mean = abs(float(differences.mean()))
    needed = ceil((reach / mean) ** 2) if mean > 0 else None
    return Power(reach / len(differences) ** 0.5, needed)


def _spread(differences: NDArray[np.float64]) -> float:
    return float(differences.std(ddof=1)) if len(differences) > 1 else 0.0


def pooled(runs: Sequence[ArrayLike]) -> NDArray[np.float64]:
    """Scores of several seeds of one method as one score per question: their mean.

    Questions stay the unit that intervals are over; seeds of training are averaged first, so three
    seeds do not pass for three times the questions.

    Raises:
        ValueError: If seeds answered different numbers of questions, or there is none.
    """
    lengths = {len(run) for run in map(np.asarray, runs)}
    if len(lengths) != 1:
        raise ValueError(f"seeds must answer the same questions, got {sorted(lengths)} of them")
    return np.mean([np.asarray(run, dtype=np.float64) for run in runs], axis=0)
