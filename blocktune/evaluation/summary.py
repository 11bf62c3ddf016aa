"""From the rows of several methods on the same questions to scores, intervals and differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from blocktune.evaluation.metrics import adjusted_f1, filter_bias
from blocktune.evaluation.rows import Row
from blocktune.evaluation.significance import holm, power, sign_flip
from blocktune.evaluation.statistics import PairedBootstrap, mcnemar_exact

SCORES = ("em", "f1", "score")
"""What gets an interval."""


def summarize(
    rows: Mapping[str, Sequence[Row]], full: str | None, naive: str | None, seed: int
) -> dict[str, dict[str, Any]]:
    """Label -> scores over all of ``rows``; one bootstrap a score serves every method.

    Args:
        rows: Label -> rows of the same questions, in the same order.
        full: Label of full prefill on the base model, or None.
        naive: Label of naive reuse on it, or None.
        seed: Of the bootstraps.
    """
    scores = {
        name: {label: [getattr(row, name) for row in own] for label, own in rows.items()}
        for name in SCORES
    }
    drawn = PairedBootstrap(
        {(name, label): scores[name][label] for name in SCORES for label in rows}, seed=seed
    )
    p_values = _p_values(scores["score"])
    summaries = {}
    for label, own in rows.items():
        (em, *em95), (_, *f1_95), (score, *score95) = (drawn.mean((name, label)) for name in SCORES)
        summaries[label] = {
            "em": em,
            "f1": fmean(scores["f1"][label]),
            "substring_em": fmean(row.substring_em for row in own),
            "score": score,
            "scores": _further(own),
            **_adjusted(scores["f1"][label], full and scores["f1"][full]),
            "ci95": em95,
            "f1_ci95": f1_95,
            "score_ci95": score95,
            "n": len(own),
            "recompute_ratio": fmean(row.recompute_ratio for row in own),
            "flops_over_full_prefill": _flops_over(own, full and rows[full]),
            **_recovered(drawn, label, full, naive),
            "em_minus": _em_minus(drawn, scores["em"], label),
            "score_minus": _score_minus(drawn, scores["score"], label, p_values),
        }
    return summaries


def p_value(own: Sequence[float], other: Sequence[float]) -> float:
    """McNemar's exact test where scores are right or wrong, else sign flips."""
    binary = set(own) | set(other) <= {0.0, 1.0}
    return mcnemar_exact(own, other) if binary else sign_flip(own, other)


def _flops_over(own: Sequence[Row], full: Sequence[Row] | None) -> float | None:
    """Operations up to the first token, choosing included, over full prefill's; None if unknown."""
    if full is None or any("flops" not in row.account for row in (*own, *full)):
        return None
    return sum(row.account["flops"] for row in own) / sum(row.account["flops"] for row in full)


def _further(own: Sequence[Row]) -> dict[str, float]:
    """Means of the metrics that all rows have: tasks may ask for different ones."""
    names = [name for name in own[0].scores if all(name in row.scores for row in own)]
    return {name: fmean(row.scores[name] for row in own) for name in names}


def _adjusted(f1: Sequence[float], full: Sequence[float] | None) -> dict[str, Any]:
    if full is None:
        names = ("adjusted_f1", "n_kept", "adjusted_f1_bias", "adjusted_f1_reverse")
        return dict.fromkeys(names)
    kept, num_kept = adjusted_f1(f1, full)
    bias, reverse = filter_bias(f1, full)
    return {
        "adjusted_f1": kept,
        "n_kept": num_kept,
        "adjusted_f1_bias": bias,
        "adjusted_f1_reverse": reverse,
    }


def _recovered(
    drawn: PairedBootstrap, label: str, full: str | None, naive: str | None
) -> dict[str, Any]:
    found = {}
    for name, key in (("em", "gap_recovered"), ("score", "score_gap_recovered")):
        ends = [(name, one) for one in (label, naive, full)]
        gap = drawn.recovered_gap(*ends) if full and naive else None
        found |= {key: gap and gap.mean, f"{key}_ci95": gap and [gap.low, gap.high]}
    return found


def _p_values(scores: Mapping[str, Sequence[float]]) -> dict[frozenset[str], dict[str, float]]:
    """The p-value of every pair, and Holm's over all pairs of the table."""
    pairs = {
        (label, other): p_value(own, scores[other])
        for index, (label, own) in enumerate(scores.items())
        for other in list(scores)[index + 1 :]
    }
    adjusted = holm(pairs)
    return {frozenset(pair): {"p": p, "p_holm": adjusted[pair]} for pair, p in pairs.items()}


def _em_minus(
    drawn: PairedBootstrap, em: Mapping[str, Sequence[float]], label: str
) -> dict[str, dict[str, Any]]:
    """How far one method is above each other; p is McNemar's, for one comparison, not for many."""
    return {
        other: _difference(drawn, "em", label, other) | {"p": mcnemar_exact(em[label], em[other])}
        for other in em
        if other != label
    }


def _score_minus(
    drawn: PairedBootstrap,
    scores: Mapping[str, Sequence[float]],
    label: str,
    p_values: Mapping[frozenset[str], dict[str, float]],
) -> dict[str, dict[str, Any]]:
    """The same of the headline score; with Holm's p, and what this many questions can show."""
    found = {}
    for other in scores:
        if other != label:
            able = power(scores[label], scores[other])
            found[other] = _difference(drawn, "score", label, other)
            found[other] |= p_values[frozenset((label, other))]
            found[other] |= {
                "detectable": able and able.detectable,
                "n_needed": able and able.num_needed,
            }
    return found


def _difference(drawn: PairedBootstrap, name: str, label: str, other: str) -> dict[str, Any]:
    mean, low, high = drawn.difference((name, label), (name, other))
    return {"mean": mean, "ci95": [low, high]}
