"""The report's tables, every number with its origin."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from blocktune.evaluation.compare import verdict
from blocktune.tables import Cell, Shown, Table, interval, number

Results = Mapping[str, Any]


def overview(results: Results) -> Table:
    """One row a method: score, cost and what it wins back."""
    rows = [
        [
            (Shown(label),),
            scored(results, "methods", label),
            _one(results, "share", "methods", label, "recompute_ratio"),
            _one(results, "ms", "methods", label, "ttft_s"),
            _one(results, "ratio", "methods", label, "ttft_over_full_prefill"),
            _one(results, "share", "methods", label, "score_gap_recovered"),
            _one(results, "count", "methods", label, "n"),
        ]
        for label in results["methods"]
    ]
    headings = ("method", "score", "recomputed", "TTFT, ms", "of full", "gap recovered", "n")
    return Table(headings, rows)


def by_group(results: Results, group: str) -> Table:
    """One row a method on one task or kind: score, EM, F1, adjusted F1 and the rest."""
    further = _further(results, group)
    rows = []
    for label in results["methods"]:
        place = ("methods", label, "tasks", group)
        cells = [(Shown(label),), scored(results, *place)]
        cells += [_one(results, "score", *place, name) for name in ("em", "f1", "substring_em")]
        cells += [_one(results, "score", *place, "scores", name) for name in further]
        rows.append([*cells, _one(results, "count", *place, "n")])
    return Table(("method", "score", "EM", "F1", "sub-EM", *further, "n"), rows)


def adjusted(results: Results) -> Table:
    """Adjusted F1 beside raw F1, with what its filter keeps and hides."""
    rows = []
    for label in results["methods"]:
        place = ("methods", label)
        raw = (
            number(results, "score", *place, "f1"),
            *interval(results, "score", *place, "f1_ci95"),
        )
        names = ("adjusted_f1", "adjusted_f1_bias", "adjusted_f1_reverse")
        cells = [_one(results, "score", *place, name) for name in names]
        rows.append([(Shown(label),), raw, *cells, _one(results, "count", *place, "n_kept")])
    return Table(("method", "raw F1", "adjusted F1", "filter hides", "reversed", "kept"), rows)


def differences(results: Results, other: str) -> Table:
    """Every method minus ``other``, with what the number of questions can tell."""
    rows = []
    for label, summary in results["methods"].items():
        if label == other:
            continue
        place = ("methods", label, "score_minus", other)
        found = summary["score_minus"][other]
        said = verdict(found["mean"], found["p_holm"], summary["n"], found["n_needed"])
        mean = number(results, "points", *place, "mean")
        rows.append(
            [
                (Shown(label),),
                (mean, *interval(results, "points", *place, "ci95")),
                _one(results, "p", *place, "p"),
                _one(results, "p", *place, "p_holm"),
                _one(results, "score", *place, "detectable"),
                (Shown(said),),
            ]
        )
    return Table(("method", f"minus {other}", "p", "p (Holm)", "detectable", "verdict"), rows)


def same_budget(results: Results) -> Table:
    """Pairs of methods that recompute the same share."""
    rows = []
    for index, pair in enumerate(results["budget"]["matched"]):
        place = ("budget", "matched", index)
        gain = (
            number(results, "points", *place, "mean"),
            *interval(results, "points", *place, "ci95"),
        )
        names = (Shown(f"{pair['better']} over {pair['worse']}"),)
        cells = [
            _one(results, "share", *place, "budget"),
            gain,
            _one(results, "p", *place, "p_holm"),
        ]
        rows.append([names, *cells])
    return Table(("pair", "budget", "difference", "p (Holm)"), rows)


def fidelity(results: Results) -> Table:
    """How close each method's next tokens are to full prefill's."""
    rows = []
    for label, summary in results["methods"].items():
        if summary["fidelity"]:
            place = ("methods", label, "fidelity")
            kl = _one(results, "nats", *place, "kl")
            rows.append([(Shown(label),), kl, _one(results, "share", *place, "top1")])
    return Table(("method", "KL, nats", "same top token"), rows)


def scored(results: Results, *place: str) -> Cell:
    """A score with its interval."""
    score = number(results, "score", *place, "score")
    return (score, *interval(results, "score", *place, "score_ci95"))


def _further(results: Results, group: str) -> list[str]:
    return list(next(iter(results["methods"].values()))["tasks"][group]["scores"])


def _one(results: Results, form: str, *place: str | int) -> Cell:
    return (number(results, form, *place),)
