"""From rows to ``results.json``: scores with intervals, by task or kind, and what they cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from blocktune.data.worlds import QUESTION_KINDS
from blocktune.evaluation.metrics import adjusted_f1
from blocktune.evaluation.rows import Row
from blocktune.evaluation.statistics import PairedBootstrap, mcnemar_exact
from blocktune.evaluation.suite import Suite
from blocktune.evaluation.ttft import TtftSummary

CI95_OF = "em"
"""The score that ``ci95`` is the interval of, here and in every task."""
ORACLE, FLOOR = "full-prefill", "naive"


def build_results(
    suite: Suite,
    rows: Mapping[str, Sequence[Row]],
    ttft: Mapping[str, TtftSummary],
    provenance: Mapping[str, Any],
) -> dict[str, Any]:
    """Summarises a finished run.

    The baselines are full prefill and naive reuse *on the base model*: adjusted F1 keeps the
    questions that the first scores on, and ``gap_recovered`` is the share of the way from the
    second to the first. Both are None where the suite lacks a baseline or there is no gap.

    Args:
        suite: What was run.
        rows: Label -> one row per question, in the same order for all.
        ttft: Label -> measured times; labels may be missing.
        provenance: Where the numbers come from.

    Returns:
        Plain JSON types: ``{"methods": {LABEL: {...}}, "provenance": {...}}``.
    """
    full, naive = _base_label(suite, ORACLE), _base_label(suite, FLOOR)
    whole = _summaries(rows, full, naive, suite.seed)
    groups = {
        name: _summaries(_take(rows, members), full, naive, suite.seed)
        for name, members in _groups(suite, next(iter(rows.values()))).items()
    }
    methods = {}
    for spec in suite.methods:
        label = spec.label
        tasks = {name: summaries[label] for name, summaries in groups.items()}
        methods[label] = (
            {"method": spec.name, "adapter": spec.adapter}
            | whole[label]
            | _times(ttft.get(label), ttft.get(full))
            | {"tasks": tasks}
        )
    return {"methods": methods, "provenance": {**provenance, "ci95_of": CI95_OF}}


def _summaries(
    rows: Mapping[str, Sequence[Row]], full: str | None, naive: str | None, seed: int
) -> dict[str, dict[str, Any]]:
    """Label -> scores over all of ``rows``; one bootstrap serves every method."""
    em = {label: [row.em for row in own] for label, own in rows.items()}
    bootstrap = PairedBootstrap(em, seed=seed)
    summaries = {}
    for label, own in rows.items():
        kept, num_kept = None, None
        if full:
            kept, num_kept = adjusted_f1([r.f1 for r in own], [r.f1 for r in rows[full]])
        gap = bootstrap.recovered_gap(label, naive, full) if full and naive else None
        mean, low, high = bootstrap.mean(label)
        summaries[label] = {
            "em": mean,
            "f1": fmean(row.f1 for row in own),
            "substring_em": fmean(row.substring_em for row in own),
            "adjusted_f1": kept,
            "ci95": [low, high],
            "n": len(own),
            "n_kept": num_kept,
            "recompute_ratio": fmean(row.recompute_ratio for row in own),
            "gap_recovered": gap and gap.mean,
            "gap_recovered_ci95": gap and [gap.low, gap.high],
            "em_minus": {
                other: _difference(bootstrap, em, label, other) for other in em if other != label
            },
        }
    return summaries


def _difference(
    bootstrap: PairedBootstrap, em: Mapping[str, Sequence[float]], label: str, other: str
) -> dict[str, Any]:
    """How far one method is above another; p is McNemar's, for one comparison, not for many."""
    mean, low, high = bootstrap.difference(label, other)
    return {"mean": mean, "ci95": [low, high], "p": mcnemar_exact(em[label], em[other])}


def _times(own: TtftSummary | None, full: TtftSummary | None) -> dict[str, Any]:
    return {
        "ttft_s": own and own.median,
        "ttft_s_quartiles": own and [own.q25, own.q75],
        "ttft_over_full_prefill": own.median / full.median if own and full else None,
        "ttft_n": own and own.num,
        "ttft_context_tokens": own and own.context_tokens,
    }


def _groups(suite: Suite, rows: Sequence[Row]) -> dict[str, list[int]]:
    """Kinds of each task; of a task without kinds, or not split by them, the task itself."""
    several = len(suite.tasks) > 1
    by_kind = {task.name: task.by_kind for task in suite.tasks}
    groups: dict[tuple[str, int, str], list[int]] = {}
    for index, row in enumerate(rows):
        kind = row.kind if by_kind[row.task] else ""
        name = "/".join(filter(None, [row.task if several or not kind else "", kind]))
        groups.setdefault((row.task, _rank(kind), name), []).append(index)
    order = [task.name for task in suite.tasks]
    ranked = sorted(groups, key=lambda group: (order.index(group[0]), group[1]))
    return {name: groups[task, rank, name] for task, rank, name in ranked}


def _rank(kind: str) -> int:
    """Kinds of our own worlds from easy to hard; others follow as they come."""
    return QUESTION_KINDS.index(kind) if kind in QUESTION_KINDS else len(QUESTION_KINDS)


def _take(rows: Mapping[str, Sequence[Row]], members: Sequence[int]) -> dict[str, list[Row]]:
    return {label: [own[index] for index in members] for label, own in rows.items()}


def _base_label(suite: Suite, name: str) -> str | None:
    """Label of a method on the base model with its default parameters."""
    plain = (m for m in suite.methods if m.name == name and m.adapter is None and not m.params)
    return next((spec.label for spec in plain), None)
