"""From rows to ``results.json``: scores with intervals, by task or kind, and what they cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from blocktune.data.worlds import QUESTION_KINDS
from blocktune.evaluation.rows import Row
from blocktune.evaluation.stats.aggregate import matched, pareto, summarize, sweeps
from blocktune.evaluation.suite import Suite
from blocktune.evaluation.ttft import TtftSummary

RESULTS = "results.json"
ORACLE, FLOOR = "full-prefill", "naive"
AVERAGED = ("em", "f1", "substring_em", "score", "recompute_ratio")
"""Fields of a row that are averaged over the seeds of a pool."""


def build_results(
    suite: Suite,
    rows: Mapping[str, Sequence[Row]],
    ttft: Mapping[str, TtftSummary],
    provenance: Mapping[str, Any],
    fidelity: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Summarises a finished run.

    The baselines are full prefill and naive reuse *on the base model*: adjusted F1 keeps the
    questions that the first scores on, and ``gap_recovered`` is the share of the way from the
    second to the first. Both are None where the suite lacks a baseline or there is no gap.
    ``score`` is each task's own headline metric; ``em`` is always exact match.

    Rows of all labels are in the same order. Times and fidelity may lack labels. In the result, all
    of it plain JSON, a pool replaces its members; their scores are its ``seeds``, its time is that
    of the first.
    """
    full, naive = base_label(suite, ORACLE), base_label(suite, FLOOR)
    seeds = {label: fmean(row.score for row in own) for label, own in rows.items()}
    rows = with_pools(rows, suite.pool)
    whole = summarize(rows, full, naive, suite.seed)
    groups = {
        name: summarize(
            {label: [own[index] for index in members] for label, own in rows.items()},
            *(full, naive, suite.seed),
        )
        for name, members in _groups(suite, next(iter(rows.values()))).items()
    }
    specs = {spec.label: spec for spec in suite.methods}
    methods = {}
    for label, summary in whole.items():
        members = suite.pool.get(label, [label])
        methods[label] = {
            "method": specs[members[0]].name,
            "adapter": specs[members[0]].adapter,
            "seeds": {one: seeds[one] for one in suite.pool.get(label, [])},
            **summary,
            **_times(ttft.get(members[0]), ttft.get(full)),
            "fidelity": mean_of([(fidelity or {}).get(one) for one in members]),
            "tasks": {name: summaries[label] for name, summaries in groups.items()},
        }
    about = ("metric", "version", "cite")
    tasks = {task.name: {key: getattr(task, key) for key in about} for task in suite.tasks}
    for task in suite.tasks:
        tasks[task.name] |= {"title": task.headline.title, "source": task.full_source()}
    return {
        "methods": methods,
        "tasks": tasks,
        "budget": {"pareto": pareto(methods), "matched": matched(methods)},
        "sweeps": sweeps(rows),
        "provenance": {**provenance, "ci95_of": "em"},  # what ``ci95`` is the interval of
    }


def _times(own: TtftSummary | None, full: TtftSummary | None) -> dict[str, Any]:
    return {
        "ttft_s": own and own.median,
        "ttft_s_quartiles": own and [own.q25, own.q75],
        "ttft_over_full_prefill": own.median / full.median if own and full else None,
        "ttft_n": own and own.num,
        "ttft_context_tokens": own and own.context_tokens,
    }


def _groups(suite: Suite, rows: Sequence[Row]) -> dict[str, list[int]]:
    """Kinds of each task; of a task without kinds, or not split by them, the task itself.

    Kinds of our own worlds are ordered from easy to hard; others follow in the order of the rows.
    """
    ranks = {kind: rank for rank, kind in enumerate(QUESTION_KINDS)}
    several = len(suite.tasks) > 1
    by_kind = {task.name: task.by_kind for task in suite.tasks}
    groups: dict[tuple[str, int, str], list[int]] = {}
    for index, row in enumerate(rows):
        kind = row.kind if by_kind[row.task] else ""
        name = "/".join(filter(None, [row.task if several or not kind else "", kind]))
        groups.setdefault((row.task, ranks.get(kind, len(ranks)), name), []).append(index)
    order = [task.name for task in suite.tasks]
    ranked = sorted(groups, key=lambda group: (order.index(group[0]), group[1]))
    return {name: groups[task, rank, name] for task, rank, name in ranked}


def base_label(suite: Suite, name: str) -> str | None:
    """Label of a method on the base model with its default parameters."""
    plain = (m for m in suite.methods if m.name == name and m.is_plain)
    return next((spec.label for spec in plain), None)


def plain_label(results: Mapping[str, Any], name: str) -> str | None:
    """Label of a method on the base model in finished results."""
    methods = results["methods"]
    plain = (n for n, m in methods.items() if m["method"] == name and m["adapter"] is None)
    return next(plain, None)


def with_pools(
    rows: Mapping[str, Sequence[Row]], pools: Mapping[str, Sequence[str]]
) -> dict[str, Sequence[Row]]:
    """The rows, with each pool instead of its members.

    Intervals are over questions: three seeds are not three times as many questions, nor three
    methods, since each further comparison would weaken Holm's correction for the others.
    """
    found: dict[str, Sequence[Row]] = {}
    pool_of = {member: name for name, members in pools.items() for member in members}
    for label, own in rows.items():
        name = pool_of.get(label)
        if name is None:
            found[label] = own
        elif name not in found:
            runs = [rows[member] for member in pools[name]]
            found[name] = [_mean_row(same) for same in zip(*runs, strict=True)]
    return found


def mean_of(values: Sequence[Any]) -> Any:
    """The mean of numbers, or of lists or mappings of them part by part; None if one is None."""
    first = values[0]
    if any(value is None for value in values):
        return None
    if isinstance(first, Mapping):
        return {key: mean_of([value.get(key) for value in values]) for key in first}
    if isinstance(first, list):
        return [mean_of(parts) for parts in zip(*values, strict=True)]
    return fmean(values)


def _mean_row(same: Sequence[Row]) -> Row:
    """The mean over seeds of one question's rows."""
    means = {name: fmean(getattr(row, name) for row in same) for name in AVERAGED}
    scores = {name: fmean(row.scores[name] for row in same) for name in same[0].scores}
    return replace(same[0], scores=scores, **means)
