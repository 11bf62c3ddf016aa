"""Accuracy by where the evidence stands and by how long the context is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from blocktune.evaluation.rows import Row
from blocktune.evaluation.statistics import PairedBootstrap

NUM_BINS = 5
MIN_ROWS = 5
"""A bin with fewer questions says nothing and is left out."""


def sweeps(rows: Mapping[str, Sequence[Row]]) -> dict[str, Any]:
    """Score in bins of equal numbers of questions, for every method.

    Args:
        rows: Label -> rows of the same questions, in the same order.

    Returns:
        ``place`` (of the evidence among the chunks, 0 first, 1 last) and ``context_tokens``, each
        ``[{"from", "to", "n", "scores": {LABEL: {"score", "ci95"}}}]``; empty where the questions
        do not differ in it.
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
            tokens = row.account.get("context_tokens", 0)
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
            span = {"from": float(values[members].min()), "to": float(values[members].max())}
            found.append(span | {"n": len(members), "scores": _scores(rows, members)})
    return found


def _scores(rows: Mapping[str, Sequence[Row]], members: np.ndarray) -> dict[str, Any]:
    scores = {label: [own[i].score for i in members] for label, own in rows.items()}
    drawn = PairedBootstrap(scores, num_resamples=2000)
    found = {label: drawn.mean(label) for label in scores}
    return {label: {"score": m, "ci95": [low, high]} for label, (m, low, high) in found.items()}
