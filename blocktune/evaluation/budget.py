"""Accuracy at equal cost: who is on the frontier, and who beats whom for the same budget."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Any

COSTS = ("recompute_ratio", "ttft_s")
NEAR = 0.02
"""Methods whose recomputed shares of layer-tokens differ by no more are at the same budget."""


def pareto(methods: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """Labels that no other method beats in score without costing more, from cheap to dear.

    Args:
        methods: Of ``results.json``.

    Returns:
        For each of `COSTS` that was measured for all methods.
    """
    fronts = {}
    for cost in COSTS:
        if all(summary[cost] is not None for summary in methods.values()):
            ranked = sorted(methods, key=lambda n: (methods[n][cost], -methods[n]["score"]))
            fronts[cost] = _front(methods, ranked)
    return fronts


def _front(methods: Mapping[str, Mapping[str, Any]], ranked: list[str]) -> list[str]:
    front: list[str] = []
    for label in ranked:
        if not front or methods[label]["score"] > methods[front[-1]]["score"]:
            front.append(label)
    return front


def matched(methods: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Pairs of methods at the same budget, with their difference in score.

    The budget is the share of the context's layer-tokens that is computed at answering time, which
    holds CacheBlend's full first layers against it, unlike the ratio that papers state.

    Args:
        methods: Of ``results.json``.
    """
    pairs = []
    for one, other in combinations(methods, 2):
        shares = [methods[name]["recompute_ratio"] for name in (one, other)]
        if min(shares) > 0 and max(shares) - min(shares) <= NEAR:
            better, worse = sorted((one, other), key=lambda name: -methods[name]["score"])
            difference = methods[better]["score_minus"][worse]
            pairs.append({"budget": sum(shares) / 2, "better": better, "worse": worse} | difference)
    return sorted(pairs, key=lambda pair: pair["budget"])
