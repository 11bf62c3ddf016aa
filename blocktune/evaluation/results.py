"""Builds ``results.json`` from rows: scores with intervals by task or kind, and their cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from operator import itemgetter
from statistics import fmean
from typing import Any

import numpy as np

from blocktune.data.worlds import QUESTION_KINDS
from blocktune.evaluation.metrics import METRICS, AdjustedF1, adjusted_f1
from blocktune.evaluation.rows import COMMON, Row
from blocktune.evaluation.significance import comparisons, mean_interval, recovered_gap
from blocktune.evaluation.suite import Suite
from blocktune.evaluation.ttft import TtftSummary

RESULTS = "results.json"
ORACLE, FLOOR = "full-prefill", "naive"
NUM_BINS, MIN_ROWS = 5, 5  # bins with fewer questions are left out
NEAR = 0.02  # up to this difference in recomputed shares of layer-tokens, budgets count as equal


def build_results(
    suite: Suite,
    rows: Mapping[str, Sequence[Row]],
    ttft: Mapping[str, TtftSummary],
    provenance: Mapping[str, Any],
    fidelity: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Summarises a finished run as plain JSON.

    The baselines are full prefill and naive reuse *on the base model*. Adjusted F1 keeps the
    questions on which full prefill scores above 0; ``score_gap_recovered`` is the share of the gap
    between the baselines that a method closes. Each is None if its baseline is missing, the gap
    also if it may be 0. Rows of all labels must be in the same order. ``ttft`` and ``fidelity`` may
    lack labels. A pool replaces its members: ``seeds`` has their scores, its times are the first's.
    """
    plain = [s for s in suite.methods if s.adapter is None and s.entry() == {"name": s.name}]
    labels = {spec.name: spec.label for spec in reversed(plain)}  # the first one decides
    full, naive = labels.get(ORACLE), labels.get(FLOOR)
    seeds = {label: fmean(row.score for row in own) for label, own in rows.items()}
    rows = with_pools(rows, suite.pool)
    groups = {}
    for name, members in _groups(suite, next(iter(rows.values()))).items():
        own_rows = {label: [own[index] for index in members] for label, own in rows.items()}
        groups[name] = summarize(own_rows, full, naive, suite.seed)
    specs = {spec.label: spec for spec in suite.methods}
    methods, whole = {}, ttft.get(full)
    for label, summary in summarize(rows, full, naive, suite.seed).items():
        members = suite.pool.get(label, [label])
        first, time = specs[members[0]], ttft.get(members[0])
        methods[label] = {
            **{"method": first.name, "adapter": first.adapter},
            "seeds": {member: seeds[member] for member in suite.pool.get(label, [])},
            **summary,
            "ttft_s": time and time.median,
            "ttft_s_quartiles": time and [time.q25, time.q75],
            "ttft_over_full_prefill": time and whole and time.median / whole.median,
            "ttft_n": time and time.num,
            "ttft_context_tokens": time and time.context_tokens,
            "fidelity": mean_of([(fidelity or {}).get(member) for member in members]),
            "tasks": {name: summaries[label] for name, summaries in groups.items()},
        }
    tasks: dict[str, Any] = {}
    for task in suite.tasks:
        tasks[task.name] = {key: getattr(task, key) for key in ("metric", "version", "cite")}
        tasks[task.name] |= {"title": METRICS[task.metric].title, "source": task.full_source()}
    budget = {"pareto": pareto(methods), "matched": matched(methods)}
    origin = {"model": suite.model, **provenance, "ci95_of": "em"}  # of which ci95 is
    results = {"methods": methods, "tasks": tasks, "budget": budget, "sweeps": sweeps(rows)}
    return results | {"provenance": origin}


def _groups(suite: Suite, rows: Sequence[Row]) -> dict[str, list[int]]:
    """Row indices by kind of question (worlds' from easy to hard), or by task if not split."""
    order, ranks = [task.name for task in suite.tasks], list(QUESTION_KINDS)
    groups: dict[tuple[int, int, str], list[int]] = {}
    for index, row in enumerate(rows):
        place = order.index(row.task)
        kind = row.kind if suite.tasks[place].by_kind and row.kind != row.task else ""
        name = "/".join(filter(None, [row.task if len(order) > 1 or not kind else "", kind]))
        rank = ranks.index(kind) if kind in ranks else len(ranks)
        groups.setdefault((place, rank, name), []).append(index)
    return {key[2]: groups[key] for key in sorted(groups, key=itemgetter(0, 1))}


def plain_label(results: Mapping[str, Any], name: str) -> str | None:
    """Label of a method on the base model in finished results, or None.

    Of several, it is the one labelled by its name: others have parameters of their own.
    """
    methods = results["methods"]
    plain = [n for n, m in methods.items() if m["method"] == name and m["adapter"] is None]
    return name if name in plain else next(iter(plain), None)


def with_pools(
    rows: Mapping[str, Sequence[Row]], pools: Mapping[str, Sequence[str]]
) -> dict[str, Sequence[Row]]:
    """Replaces the members of each pool by their mean, question by question.

    So seeds of one recipe count as one method: intervals are over questions, which seeds do not
    add to, and each further comparison makes Holm's correction stricter.
    """
    pool_of = {member: name for name, members in pools.items() for member in members}
    merged = {pool_of.get(label, label): own for label, own in rows.items()}
    for name, members in pools.items():
        merged[name] = []
        for same in zip(*(rows[member] for member in members), strict=True):
            averaged = ("scores", *COMMON, "score", "recompute_ratio")
            means = {key: mean_of([getattr(row, key) for row in same]) for key in averaged}
            merged[name].append(replace(same[0], **means))
    return merged


def mean_of(values: Sequence[Any]) -> Any:
    """Mean of numbers, or elementwise of lists or mappings of them; None if a value is None."""
    first = values[0]
    if any(value is None for value in values):
        return None
    if isinstance(first, Mapping):
        return {key: mean_of([value.get(key) for value in values]) for key in first}
    if isinstance(first, list):
        return [mean_of(parts) for parts in zip(*values, strict=True)]
    return fmean(values)


def pareto(methods: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """The Pareto front for each measured cost: labels from cheap to expensive, scores rising."""
    fronts: dict[str, list[str]] = {}
    for cost in ("recompute_ratio", "ttft_s"):
        if all(summary[cost] is not None for summary in methods.values()):
            front = fronts[cost] = []
            for label in sorted(methods, key=lambda n: (methods[n][cost], -methods[n]["score"])):
                if not front or methods[label]["score"] > methods[front[-1]]["score"]:
                    front.append(label)
    return fronts


def matched(methods: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Pairs of methods that recompute the same share of layer-tokens, with their difference."""
    pairs = []
    for pair in combinations(methods, 2):
        shares = [methods[name]["recompute_ratio"] for name in pair]
        if min(shares) > 0 and max(shares) - min(shares) <= NEAR:
            better, worse = sorted(pair, key=lambda name: -methods[name]["score"])
            difference = methods[better]["score_minus"][worse]
            pairs.append({"budget": sum(shares) / 2, "better": better, "worse": worse} | difference)
    return sorted(pairs, key=lambda pair: pair["budget"])


def summarize(
    rows: Mapping[str, Sequence[Row]], full: str | None, naive: str | None, seed: int
) -> dict[str, dict[str, Any]]:
    """Scores of all ``rows`` by label; ``full`` and ``naive``: labels of the baselines, or None."""
    scores = {label: [row.score for row in own] for label, own in rows.items()}
    f1 = {label: [row.f1 for row in own] for label, own in rows.items()}
    pairs = {pair: [scores[label] for label in pair] for pair in combinations(rows, 2)}
    minus: dict[str, dict[str, Any]] = {label: {} for label in rows}
    for (one, other), test in comparisons(pairs, seed).items():
        low, high = test["ci95"]
        minus[one][other] = test
        minus[other][one] = test | {"mean": 0 - test["mean"], "ci95": [0 - high, 0 - low]}
    summaries, whole = {}, _flops(rows[full]) if full else None
    for label, own in rows.items():
        flops = _flops(own)
        per_question = ([row.em for row in own], f1[label], scores[label])
        em, raw, score = map(mean_interval, per_question)
        ends = [scores[naive], scores[full]] if full and naive else None
        gap = ends and recovered_gap(scores[label], *ends)
        adjusted = adjusted_f1(f1[label], f1[full]) if full else AdjustedF1(None, None, None)
        names = [name for name in own[0].scores if all(name in row.scores for row in own)]
        summaries[label] = {
            **{"em": em.mean, "f1": raw.mean},
            "substring_em": fmean(row.substring_em for row in own),
            "score": score.mean,
            "scores": {name: fmean(row.scores[name] for row in own) for name in names},
            "adjusted_f1": adjusted.mean,
            "n_kept": adjusted.num_kept,
            "adjusted_f1_bias": adjusted.bias,
            **{"ci95": em.ci95, "f1_ci95": raw.ci95, "score_ci95": score.ci95, "n": len(own)},
            "recompute_ratio": fmean(row.recompute_ratio for row in own),
            "flops_over_full_prefill": None if None in (flops, whole) else flops / whole,
            "score_gap_recovered": gap and gap.mean,
            "score_gap_recovered_ci95": gap and gap.ci95,
            "score_minus": minus[label],
        }
    return summaries


def _flops(rows: Sequence[Row]) -> int | None:
    """FLOPs up to the first token, with selection; None if not counted."""
    counts = [row.usage.get("flops") for row in rows]
    return None if None in counts else sum(counts)


def sweeps(rows: Mapping[str, Sequence[Row]]) -> dict[str, Any]:
    """Scores of every method by position of the evidence and by context length.

    In bins of equal size by ``place`` (0: first chunk, 1: last) and ``context_tokens``: ``[{"from",
    "to", "n", "scores": {LABEL: {"score", "ci95"}}}]``, or [] if all questions have the same value.
    """
    first, *_ = rows.values()
    questions = zip(*rows.values(), strict=True)
    # The longest context that any method read: a baseline may have read none.
    lengths = [max(r.usage.get("context_tokens", 0) for r in same) or None for same in questions]
    places = [row.place for row in first]
    return {"place": _sweep(rows, places), "context_tokens": _sweep(rows, lengths)}


def _sweep(rows: Mapping[str, Sequence[Row]], by: Sequence[float | None]) -> list[dict[str, Any]]:
    values = np.array(by, dtype=float)  # None becomes NaN
    known = np.flatnonzero(~np.isnan(values))
    if len(known) < 2 * MIN_ROWS or len(set(values[known])) < 2:
        return []
    edges = np.unique(np.quantile(values[known], np.linspace(0, 1, NUM_BINS + 1)))
    bins = np.clip(np.searchsorted(edges, values[known], side="right") - 1, 0, len(edges) - 2)
    cells = []
    for number in range(len(edges) - 1):
        members = known[bins == number]
        if len(members) >= MIN_ROWS:
            means = {n: mean_interval([own[i].score for i in members]) for n, own in rows.items()}
            scores = {n: {"score": mean.mean, "ci95": mean.ci95} for n, mean in means.items()}
            span = {"from": float(values[members].min()), "to": float(values[members].max())}
            cells.append(span | {"n": len(members), "scores": scores})
    return cells
