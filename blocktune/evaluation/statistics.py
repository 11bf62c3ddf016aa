"""How sure a score is: paired bootstrap intervals and McNemar's test.

Methods answer the same questions, so every comparison is paired: one resample draws questions,
and all methods are read on the same draw.
"""

from __future__ import annotations

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


def resampled_means(
    scores: ArrayLike, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> NDArray[np.float64]:
    """Means over questions drawn with replacement, the same draw for every method.

    Args:
        scores: Scores per method and question, ``(M, n)``.
        num_resamples: How many draws.
        seed: Equal seeds give equal draws.

    Returns:
        Means, ``(M, num_resamples)``.

    Raises:
        ValueError: If there is no question.
    """
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 2 or values.shape[1] == 0:
        raise ValueError(f"scores must be (methods, questions >= 1), got shape {values.shape}")
    rng = np.random.default_rng(seed)
    means = np.empty((values.shape[0], num_resamples))
    for start in range(0, num_resamples, _BLOCK):
        stop = min(start + _BLOCK, num_resamples)
        means[:, start:stop] = values @ _draw(rng, stop - start, values.shape[1]).T
    return means / values.shape[1]


def mean_interval(
    scores: ArrayLike,
    *,
    confidence: float = 0.95,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Interval:
    """A mean and its percentile bootstrap interval.

    When all scores are equal the interval has no width: resampling cannot know the unseen.

    Args:
        scores: One score per question, ``(n,)``.
        confidence: Coverage in (0, 1).
        num_resamples: How many draws.
        seed: Of the draws.

    Source: Efron & Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
    """
    values = np.asarray(scores, dtype=np.float64)
    means = resampled_means(values[None], num_resamples=num_resamples, seed=seed)[0]
    return Interval(float(values.mean()), *_percentiles(means, confidence))


def difference_interval(
    scores: ArrayLike,
    baseline: ArrayLike,
    *,
    confidence: float = 0.95,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Interval:
    """The paired difference ``mean(scores) - mean(baseline)`` and its bootstrap interval.

    Args:
        scores: One method's scores, ``(n,)``.
        baseline: The other's on the same questions, ``(n,)``.
        confidence: Coverage in (0, 1).
        num_resamples: How many draws.
        seed: Of the draws.

    Raises:
        ValueError: If the two are not of one length.

    Source: Koehn, Statistical Significance Tests for Machine Translation Evaluation (2004).
    """
    left, right = _paired(scores, baseline)
    return mean_interval(
        left - right, confidence=confidence, num_resamples=num_resamples, seed=seed
    )


def recovered_gap(
    scores: ArrayLike,
    floor: ArrayLike,
    ceiling: ArrayLike,
    *,
    confidence: float = 0.95,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Interval | None:
    """``(scores - floor) / (ceiling - floor)`` of the means, and its paired bootstrap interval.

    Args:
        scores: The method's scores, ``(n,)``.
        floor: Naive reuse on the same questions, ``(n,)``.
        ceiling: Full prefill on the same questions, ``(n,)``.
        confidence: Coverage in (0, 1).
        num_resamples: How many draws.
        seed: Of the draws.

    Returns:
        None where the interval of the gap itself reaches zero: a share of nothing says nothing.
    """
    left, low = _paired(scores, floor)
    stacked = np.stack([left - low, _paired(ceiling, floor)[0] - low])
    part, gap = resampled_means(stacked, num_resamples=num_resamples, seed=seed)
    if _percentiles(gap, confidence)[0] <= 0:
        return None
    shares = part[gap > 0] / gap[gap > 0]
    return Interval(float(stacked[0].mean() / stacked[1].mean()), *_percentiles(shares, confidence))


def mcnemar_exact(correct: ArrayLike, baseline: ArrayLike) -> float:
    """Two-sided exact p-value that two methods are right equally often.

    Only questions on which they disagree count: under the null hypothesis each falls to either
    side with probability 1/2.

    Args:
        correct: Whether one method is right, ``(n,)``, booleans or 0 and 1.
        baseline: The same for the other.

    Source: McNemar (1947), in the exact binomial form.
    """
    left, right = _paired(correct, baseline)
    wins, losses = int((left > right).sum()), int((left < right).sum())
    if wins + losses == 0:
        return 1.0
    tail = sum(comb(wins + losses, k) for k in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / 2 ** (wins + losses))


def _draw(rng: np.random.Generator, num_draws: int, n: int) -> NDArray[np.float64]:
    """How often each of ``n`` questions is drawn in each draw of ``n``, ``(num_draws, n)``."""
    picked = rng.integers(n, size=(num_draws, n)) + n * np.arange(num_draws)[:, None]
    return np.bincount(picked.ravel(), minlength=num_draws * n).reshape(num_draws, n).astype(float)


def _percentiles(values: NDArray[np.float64], confidence: float) -> tuple[float, float]:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _paired(left: ArrayLike, right: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    first, second = np.asarray(left, dtype=np.float64), np.asarray(right, dtype=np.float64)
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(
            f"paired scores must be two lists of one length, got {first.shape} and {second.shape}"
        )
    return first, second
