"""Is a difference more than chance, after many comparisons, and could n questions have shown it?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil, erfc, sqrt
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from blocktune.evaluation.statistics import paired

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
