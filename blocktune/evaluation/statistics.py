"""How sure a score is: paired bootstrap intervals and McNemar's test.

Methods answer the same questions, so every comparison is paired: one resample draws questions,
and all methods are read on the same draw.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from math import comb
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
