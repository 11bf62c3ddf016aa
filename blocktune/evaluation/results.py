"""From rows to ``results.json``: scores with intervals, by task or kind, and what they cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from statistics import fmean
from typing import Any

import numpy as np

from blocktune.data.worlds import QUESTION_KINDS
from blocktune.evaluation import significance
from blocktune.evaluation.metrics import AdjustedF1, adjusted_f1
from blocktune.evaluation.rows import Row
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
            found[name] = []
            for same in zip(*(rows[member] for member in pools[name]), strict=True):
                means = {key: fmean(getattr(row, key) for row in same) for key in AVERAGED}
                scores = mean_of([row.scores for row in same])
                found[name].append(replace(same[0], scores=scores, **means))
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


def summarize(
    rows: Mapping[str, Sequence[Row]], full: str | None, naive: str | None, seed: int
) -> dict[str, dict[str, Any]]:
    """Label -> scores over all of ``rows``, with intervals and differences.

    All labels have rows of the same questions, in the same order. ``full`` and ``naive`` are the
    baselines' labels on the base model, or None; ``seed`` is that of the sign flips.
    """
    scores = {label: [row.score for row in own] for label, own in rows.items()}
    f1 = {label: [row.f1 for row in own] for label, own in rows.items()}
    pairs = {
        frozenset((one, other)): significance.p_value(scores[one], scores[other], seed=seed)
        for one, other in combinations(rows, 2)
    }
    p_holm = significance.holm(pairs)
    summaries = {}
    for label, own in rows.items():
        asked = ([row.em for row in own], f1[label], scores[label])
        em, raw, score = map(significance.mean_interval, asked)
        gap = None
        if full and naive:
            gap = significance.recovered_gap(scores[label], scores[naive], scores[full])
        adjusted = adjusted_f1(f1[label], f1[full]) if full else AdjustedF1(None, None, None)
        summaries[label] = {
            "em": em.mean,
            "f1": raw.mean,
            "substring_em": fmean(row.substring_em for row in own),
            "score": score.mean,
            "scores": _further(own),
            "adjusted_f1": adjusted.mean,
            "n_kept": adjusted.num_kept,
            "adjusted_f1_bias": adjusted.bias,
            "ci95": em.ci95,
            "f1_ci95": raw.ci95,
            "score_ci95": score.ci95,
            "n": len(own),
            "recompute_ratio": fmean(row.recompute_ratio for row in own),
            "flops_over_full_prefill": _flops_over(own, full and rows[full]),
            "score_gap_recovered": gap and gap.mean,
            "score_gap_recovered_ci95": gap and gap.ci95,
            "score_minus": {
                other: _difference(scores[label], scores[other], pairs[pair], p_holm[pair])
                for other in rows
                if (pair := frozenset((label, other))) in pairs
            },
        }
    return summaries


def _difference(
    own: Sequence[float], other: Sequence[float], p: float, p_holm: float
) -> dict[str, Any]:
    """How far one method is above another, and what this many questions can show of it."""
    above, able = significance.difference(own, other), significance.power(own, other, p, p_holm)
    tested = {"mean": above.mean, "ci95": above.ci95, "p": p, "p_holm": p_holm}
    return tested | {key: getattr(able, key, None) for key in significance.Power._fields}


def _flops_over(own: Sequence[Row], full: Sequence[Row] | None) -> float | None:
    """Operations up to the first token, choosing included, over full prefill's; None if unknown."""
    if full is None or any("flops" not in row.usage for row in (*own, *full)):
        return None
    return sum(row.usage["flops"] for row in own) / sum(row.usage["flops"] for row in full)


def _further(own: Sequence[Row]) -> dict[str, float]:
    """Means of the metrics that all rows have: tasks may ask for different ones."""
    names = [name for name in own[0].scores if all(name in row.scores for row in own)]
    return {name: fmean(row.scores[name] for row in own) for name in names}


NUM_BINS = 5
MIN_ROWS = 5  # bins with fewer questions are left out


def sweeps(rows: Mapping[str, Sequence[Row]]) -> dict[str, Any]:
    """Score in bins of equal numbers of questions, for every method.

    By ``place`` (of the evidence among the chunks, 0 first, 1 last) and ``context_tokens``, each
    ``[{"from", "to", "n", "scores": {LABEL: {"score", "ci95"}}}]``; empty where the questions do
    not differ in it. All labels have rows of the same questions, in the same order.
    """
    first, *_ = rows.values()
    asked = zip(*rows.values(), strict=True)
    # The longest context that any method read: a baseline may have read none.
    lengths = [max(row.usage.get("context_tokens", 0) for row in same) or None for same in asked]
    return {
        "place": _sweep(rows, [row.place for row in first]),
        "context_tokens": _sweep(rows, lengths),
    }


def _sweep(
    rows: Mapping[str, Sequence[Row]], of_each: Sequence[float | None]
) -> list[dict[str, Any]]:
    values = np.array(of_each, dtype=float)  # None is NaN
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
            means = {n: significance.mean_interval(own) for n, own in scores.items()}
            cells = {n: {"score": one.mean, "ci95": one.ci95} for n, one in means.items()}
            span = {"from": float(values[members].min()), "to": float(values[members].max())}
            found.append(span | {"n": len(members), "scores": cells})
    return found
