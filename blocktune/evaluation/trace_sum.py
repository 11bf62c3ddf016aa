"""From what was served of a trace to its cells: seeds joined, intervals, differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from blocktune.evaluation.aggregate import p_value
from blocktune.evaluation.pooling import mean_of
from blocktune.evaluation.statistics import PairedBootstrap, holm

SPENT = ("stored_bytes", "hit_rate", "recompute_ratio", "ttft_s")


def summed_up(
    served: Sequence[Mapping[str, Any]], pools: Mapping[str, Sequence[str]], seed: int
) -> list[dict[str, Any]]:
    """The cells of one trace; all of them answered the same requests, so differences are paired.

    Questions are the unit that intervals are over, the mean of a question's returns its score: to
    be asked ten times does not make ten questions of one.

    Args:
        served: Per method and size of memory its ``scores``, one a question, and what it spent.
        pools: Name -> labels of methods that differ in a seed only.
        seed: Of the bootstrap.

    Returns:
        With ``score``, ``ci95``, ``n`` (requests), ``questions``, ``seeds`` and ``minus``: method
        -> ``mean``, ``ci95``, ``p`` and Holm's ``p_holm``, in the same size of memory.
    """
    found = []
    for mib in dict.fromkeys(cell["store_mib"] for cell in served):
        cells = _pooled([cell for cell in served if cell["store_mib"] == mib], pools)
        scores = {label: cell["scores"] for label, cell in cells.items()}
        drawn = PairedBootstrap(scores, seed=seed)
        minus = _minus(drawn, scores)
        for label, cell in cells.items():
            mean, low, high = drawn.mean(label)
            own = {"method": label, "score": mean, "ci95": [low, high]}
            own["questions"] = len(scores[label])
            kept = {key: cell[key] for key in ("n", "adapter", "store_mib", "seeds", *SPENT)}
            found.append(own | kept | {"minus": minus[label]})
    return found


def _pooled(
    cells: Sequence[Mapping[str, Any]], pools: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, Any]]:
    by_label = {cell["method"]: cell for cell in cells}
    pool_of = {member: name for name, members in pools.items() for member in members}
    found: dict[str, dict[str, Any]] = {}
    for label, cell in by_label.items():
        name = pool_of.get(label, label)
        if name not in found:
            members = [by_label[one] for one in pools.get(name, [label])]
            seeds = {one["method"]: mean_of(one["scores"]) for one in members if name != label}
            spent = mean_of([{key: one[key] for key in (*SPENT, "scores")} for one in members])
            found[name] = {**cell, **spent, "seeds": seeds}
    return found


def _minus(
    drawn: PairedBootstrap, scores: Mapping[str, Sequence[float]]
) -> dict[str, dict[str, Any]]:
    labels = list(scores)
    pairs = {
        (one, other): p_value(scores[one], scores[other])
        for index, one in enumerate(labels)
        for other in labels[index + 1 :]
    }
    adjusted = holm(pairs)
    found: dict[str, dict[str, Any]] = {label: {} for label in labels}
    for (one, other), p in pairs.items():
        for left, right in ((one, other), (other, one)):
            mean, low, high = drawn.difference(left, right)
            p_values = {"p": p, "p_holm": adjusted[one, other]}
            found[left][right] = {"mean": mean, "ci95": [low, high], **p_values}
    return found
