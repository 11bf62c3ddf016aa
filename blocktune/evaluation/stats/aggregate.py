"""From the rows of several methods on the same questions to scores, intervals and frontiers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from statistics import fmean
from typing import Any

import numpy as np

from blocktune.evaluation.metrics import adjusted_f1
from blocktune.evaluation.rows import Row
from blocktune.evaluation.stats import significance

COSTS = ("recompute_ratio", "ttft_s")
NEAR = 0.02
"""Methods whose recomputed shares of layer-tokens differ by no more are at the same budget."""


def pareto(methods: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """For each known cost, a label that no other beats without costing more; the cheapest first."""
    fronts: dict[str, list[str]] = {}
    for cost in COSTS:
        if all(summary[cost] is not None for summary in methods.values()):
            front = fronts[cost] = []
            for label in sorted(methods, key=lambda n: (methods[n][cost], -methods[n]["score"])):
                if not front or methods[label]["score"] > methods[front[-1]]["score"]:
                    front.append(label)
    return fronts


def matched(methods: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Pairs of methods at the same budget, with their difference in score.

    The budget is the share of the context's layer-tokens that is computed at answering time. It
    counts CacheBlend's full first layers, unlike the ratio that papers state.
    """
    pairs = []
    for one, other in combinations(methods, 2):
        shares = [methods[name]["recompute_ratio"] for name in (one, other)]
        if min(shares) > 0 and max(shares) - min(shares) <= NEAR:
            better, worse = sorted((one, other), key=lambda name: -methods[name]["score"])
            difference = methods[better]["score_minus"][worse]
            pairs.append({"budget": sum(shares) / 2, "better": better, "worse": worse} | difference)
    return sorted(pairs, key=lambda pair: pair["budget"])


SCORES = ("em", "f1", "score")  # what gets an interval


def summarize(
    rows: Mapping[str, Sequence[Row]], full: str | None, naive: str | None, seed: int
) -> dict[str, dict[str, Any]]:
    """Label -> scores over all of ``rows``, with intervals and differences.

    All labels have rows of the same questions, in the same order. ``full`` and ``naive`` are the
    baselines' labels on the base model, or None; ``seed`` is that of the sign flips.
    """
    scores = {
        name: {label: [getattr(row, name) for row in own] for label, own in rows.items()}
        for name in SCORES
    }
    paired = {name: significance.PairedScores(own) for name, own in scores.items()}
    pairs = {
        frozenset((one, other)): significance.p_value(own, scores["score"][other], seed=seed)
        for (one, own), (other, _) in combinations(scores["score"].items(), 2)
    }
    p_holm = significance.holm(pairs)
    p_values = {pair: {"p": p, "p_holm": p_holm[pair]} for pair, p in pairs.items()}
    summaries = {}
    for label, own in rows.items():
        (em, *em95), (f1, *f1_95), (score, *score95) = (paired[n].mean(label) for n in SCORES)
        summaries[label] = {
            "em": em,
            "f1": f1,
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
            **_recovered(paired, label, full, naive),
            "em_minus": {},
            "score_minus": {},
        }
        for other in (one for one in rows if one != label):
            em, score = ((scores[name][label], scores[name][other]) for name in ("em", "score"))
            tested = p_values[frozenset((label, other))]
            able = significance.power(*score, **tested)
            power = able._asdict() if able else dict.fromkeys(significance.Power._fields)
            # McNemar's p of one comparison, not of many.
            p = {"p": significance.mcnemar_exact(*em)}
            summaries[label]["em_minus"][other] = _difference(paired["em"], label, other) | p
            above = _difference(paired["score"], label, other)
            summaries[label]["score_minus"][other] = above | tested | power
    return summaries


def _flops_over(own: Sequence[Row], full: Sequence[Row] | None) -> float | None:
    """Operations up to the first token, choosing included, over full prefill's; None if unknown."""
    if full is None or any("flops" not in row.usage for row in (*own, *full)):
        return None
    return sum(row.usage["flops"] for row in own) / sum(row.usage["flops"] for row in full)


def _further(own: Sequence[Row]) -> dict[str, float]:
    """Means of the metrics that all rows have: tasks may ask for different ones."""
    names = [name for name in own[0].scores if all(name in row.scores for row in own)]
    return {name: fmean(row.scores[name] for row in own) for name in names}


def _adjusted(f1: Sequence[float], full: Sequence[float] | None) -> dict[str, Any]:
    names = ("adjusted_f1", "n_kept", "adjusted_f1_bias", "adjusted_f1_reverse")
    found = (None,) * len(names) if full is None else adjusted_f1(f1, full)
    return dict(zip(names, found, strict=True))


def _recovered(
    paired: Mapping[str, significance.PairedScores], label: str, full: str | None, naive: str | None
) -> dict[str, Any]:
    found = {}
    for name, key in (("em", "gap_recovered"), ("score", "score_gap_recovered")):
        gap = paired[name].recovered_gap(label, naive, full) if full and naive else None
        found |= {key: gap and gap.mean, f"{key}_ci95": gap and [gap.low, gap.high]}
    return found


def _difference(paired: significance.PairedScores, label: str, other: str) -> dict[str, Any]:
    """How far one method is above another."""
    mean, *ci95 = paired.difference(label, other)
    return {"mean": mean, "ci95": ci95}


NUM_BINS = 5
MIN_ROWS = 5  # bins with fewer questions are left out


def sweeps(rows: Mapping[str, Sequence[Row]]) -> dict[str, Any]:
    """Score in bins of equal numbers of questions, for every method.

    By ``place`` (of the evidence among the chunks, 0 first, 1 last) and ``context_tokens``, each
    ``[{"from", "to", "n", "scores": {LABEL: {"score", "ci95"}}}]``; empty where the questions do
    not differ in it. All labels have rows of the same questions, in the same order.
    """
    return {
        "place": _sweep(rows, lambda row: row.place),
        "context_tokens": _sweep(rows, _length_of(rows)),
    }


def _length_of(rows: Mapping[str, Sequence[Row]]) -> Callable[[Row], float | None]:
    """The longest context that any method read: a baseline may have read none."""
    longest: dict[tuple[str, str], int] = {}
    for own in rows.values():
        for row in own:
            tokens = row.usage.get("context_tokens", 0)
            longest[row.task, row.id] = max(tokens, longest.get((row.task, row.id), 0))
    return lambda row: longest[row.task, row.id] or None


def _sweep(rows: Mapping[str, Sequence[Row]], value: Callable) -> list[dict[str, Any]]:
    first = next(iter(rows.values()))
    values = np.array([np.nan if (v := value(row)) is None else v for row in first], dtype=float)
    known = np.flatnonzero(~np.isnan(values))
    if len(known) < 2 * MIN_ROWS or len(set(values[known])) < 2:
        return []
    edges = np.unique(np.quantile(values[known], np.linspace(0, 1, NUM_BINS + 1)))
    bins = np.clip(np.searchsorted(edges, values[known], side="right") - 1, 0, len(edges) - 2)
    found = []
    for number in range(len(edges) - 1):
        members = known[bins == number]
        if len(members) >= MIN_ROWS:
            scores = {n: [own[i].score for i in members] for n, own in rows.items()}
            paired, cells = significance.PairedScores(scores), {}
            for label in rows:
                mean, *ci95 = paired.mean(label)
                cells[label] = {"score": mean, "ci95": ci95}
            span = {"from": float(values[members].min()), "to": float(values[members].max())}
            found.append(span | {"n": len(members), "scores": cells})
    return found
