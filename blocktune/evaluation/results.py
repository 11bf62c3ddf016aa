"""From rows to ``results.json``: scores with intervals, by task or kind, and what they cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from blocktune.evaluation.metrics import adjusted_f1
from blocktune.evaluation.rows import Row
from blocktune.evaluation.statistics import mcnemar_exact, mean_interval, recovered_gap
from blocktune.evaluation.suite import MethodSpec, Suite
from blocktune.evaluation.ttft import TtftSummary

CI95_OF = "em"
"""The score that ``ci95`` is the interval of, here and in every task."""


def build_results(
    suite: Suite,
    rows: Mapping[str, Sequence[Row]],
    ttft: Mapping[str, TtftSummary],
    provenance: Mapping[str, Any],
) -> dict[str, Any]:
    """Summarises a finished run.

    The baselines are full prefill and naive reuse *on the base model*: adjusted F1 keeps the
    questions that the first scores on, and ``gap_recovered`` is the share of the way from the
    second to the first. Both are None where the suite lacks a baseline.

    Args:
        suite: What was run.
        rows: Label -> one row per question, in the same order for all.
        ttft: Label -> measured times; labels may be missing.
        provenance: Where the numbers come from.

    Returns:
        Plain JSON types: ``{"methods": {LABEL: {...}}, "provenance": {...}}``.
    """
    full, naive = (_baseline(suite, rows, name) for name in ("full-prefill", "naive"))
    methods = {}
    for spec in suite.methods:
        groups = _groups(suite, rows[spec.label])
        summary = _summary(spec.label, rows, full, naive, suite.seed, range(len(rows[spec.label])))
        summary |= _times(spec, ttft, suite)
        summary["tasks"] = {
            name: _summary(spec.label, rows, full, naive, suite.seed, members)
            for name, members in groups.items()
        }
        methods[spec.label] = {"method": spec.name, "adapter": spec.adapter} | summary
    return {"methods": methods, "provenance": {**provenance, "ci95_of": CI95_OF}}


def _summary(
    label: str,
    rows: Mapping[str, Sequence[Row]],
    full: Sequence[Row] | None,
    naive: Sequence[Row] | None,
    seed: int,
    members: Sequence[int],
) -> dict[str, Any]:
    def column(source: Sequence[Row], name: str) -> list[float]:
        return [getattr(source[i], name) for i in members]

    own = rows[label]
    em, f1 = column(own, "em"), column(own, "f1")
    kept = adjusted_f1(f1, column(full, "f1")) if full else (None, None)
    summary = {
        "em": fmean(em),
        "f1": fmean(f1),
        "substring_em": fmean(column(own, "substring_em")),
        "adjusted_f1": kept[0],
        "ci95": list(mean_interval(em, seed=seed)[1:]),
        "n": len(members),
        "n_kept": kept[1],
        "recompute_ratio": fmean(column(own, "recompute_ratio")),
    }
    if full and naive:
        gap = recovered_gap(em, column(naive, "em"), column(full, "em"), seed=seed)
        summary["gap_recovered"] = gap and gap.mean
        summary["gap_recovered_ci95"] = gap and list(gap[1:])
    if full:
        summary["p_against_full_prefill"] = mcnemar_exact(em, column(full, "em"))
    return summary


def _times(spec: MethodSpec, ttft: Mapping[str, TtftSummary], suite: Suite) -> dict[str, Any]:
    own = ttft.get(spec.label)
    full = next((m.label for m in suite.methods if _is_base(m, "full-prefill")), None)
    ratio = own.median / ttft[full].median if own and full else None
    return {
        "ttft_s": own and own.median,
        "ttft_s_quartiles": own and [own.q25, own.q75],
        "ttft_over_full_prefill": ratio,
        "ttft_n": own and own.num,
    }


def _groups(suite: Suite, rows: Sequence[Row]) -> dict[str, list[int]]:
    """Kinds of each task; of a task without kinds, or not split by them, the task itself."""
    several = len(suite.tasks) > 1
    by_kind = {task.name: task.by_kind for task in suite.tasks}
    groups: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        kind = row.kind if by_kind[row.task] else ""
        name = "/".join(filter(None, [row.task if several or not kind else "", kind]))
        groups.setdefault(name, []).append(index)
    return groups


def _baseline(suite: Suite, rows: Mapping[str, Sequence[Row]], name: str) -> Sequence[Row] | None:
    return next((rows[m.label] for m in suite.methods if _is_base(m, name)), None)


def _is_base(spec: MethodSpec, name: str) -> bool:
    return spec.name == name and spec.adapter is None and not spec.params
