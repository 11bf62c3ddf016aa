"""Scores recipes: adjusted F1 with paired intervals over questions, averaged over seeds first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from queries import BLEND, FULL, JOINED, NAIVE, in_full

from blocktune.evaluation.metrics import adjusted_f1
from blocktune.evaluation.rows import Row
from blocktune.evaluation.significance import (
    Interval,
    difference,
    mean_interval,
    recovered_gap,
)

SHARE = 0.97
"""Share of full prefill's adjusted F1 that a recipe should reach."""
LOSS = 0.01
"""Largest accuracy loss in full attention that an adapter may cause."""
Rows = Mapping[str, Sequence[Row]]


class Judge:
    """Scores all methods on the questions that the base model answers by full prefill, and on all.

    Args:
        rows: Rows of the same questions by label; the labels of a recipe are ``RECIPE-SEED``.
        recipes: Labels of the seeds by name of the recipe.
        plain: The recipe that the others are compared with, or None.
    """

    def __init__(self, rows: Rows, recipes: Mapping[str, Sequence[str]], plain: str | None = None):
        self.rows, self.recipes, self.plain = rows, recipes, plain
        self.asked = [i for i, row in enumerate(rows[FULL]) if row.task == JOINED]
        self.kept = [i for i in self.asked if rows[FULL][i].f1 > 0]
        self.adjusted, self.raw = self._scores(self.kept), self._scores(self.asked)

    def _scores(self, questions: Sequence[int]) -> dict[str, list[float]]:
        scores = {label: [own[i].f1 for i in questions] for label, own in self.rows.items()}
        for name, labels in self.recipes.items():
            scores[name] = pooled([scores[label] for label in labels])
        scores["wanted"] = [SHARE * score for score in scores[FULL]]
        scores["nothing"] = [0.0] * len(questions)
        return scores

    def score(self, label: str) -> dict[str, Any]:
        """Adjusted and raw F1 (on all questions) of a method, or of a recipe over its seeds."""
        adjusted, raw = (mean_interval(own[label]) for own in (self.adjusted, self.raw))
        labels = self.recipes.get(label, [label])
        return {
            "adjusted_f1": adjusted.mean,
            "ci95": adjusted.ci95,
            "n": len(self.kept),
            "asked": len(self.asked),
            "raw_f1": raw.mean,
            "raw_ci95": raw.ci95,
            "filter_bias": self._bias(labels),
            "em": _by_kind([self.rows[label] for label in labels]),
        }

    def recipe(self, name: str, control: str | None) -> dict[str, Any]:
        """Compares a recipe with full prefill, CacheBlend, naive reuse and the control."""
        own, raw = self.adjusted, self.raw
        blend, naive = (difference(own[name], own[other]) for other in (BLEND, NAIVE))
        full = self._full_attention(name)
        compared = self.plain if self.plain != name else None
        return {
            **self.score(name),
            "seeds": {label: fmean(own[label]) for label in self.recipes[name]},
            "of_full_prefill": _of(own, name, "nothing", FULL),
            "minus_97_percent_of_full_prefill": self._wanted(name),
            "seeds_minus_97_percent": {seed: self._wanted(seed) for seed in self.recipes[name]},
            "raw_of_full_prefill": _of(raw, name, "nothing", FULL),
            "minus_cacheblend": _plain(blend) | {"met": blend.low > 0},
            "minus_naive": _plain(naive) | {"met": naive.low > 0},
            "minus_plain": compared and _plain(difference(own[name], own[compared])),
            "gap_recovered": _of(own, name, NAIVE, FULL),
            "of_control": control and _of(own, name, "nothing", control),
            "full_attention": full,
        }

    def _wanted(self, label: str) -> dict[str, Any]:
        above = difference(self.adjusted[label], self.adjusted["wanted"])
        return _plain(above) | {"met": above.low >= 0}

    def _bias(self, labels: Sequence[str]) -> float | None:
        """Bias of the filter of adjusted F1, mean over the seeds; None if no question is kept."""
        full = [self.rows[FULL][i].f1 for i in self.asked]
        scores = [adjusted_f1([self.rows[name][i].f1 for i in self.asked], full) for name in labels]
        return fmean(score.bias for score in scores) if self.kept else None

    def _full_attention(self, name: str) -> dict[str, Any]:
        """Exact match of the adapter in full attention on all questions, and of the base model."""
        base = [row.em for row in self.rows[FULL]]
        seeds = [label.rpartition("-")[2] for label in self.recipes[name]]
        runs = [self.rows[f"{in_full(name)}-{seed}"] for seed in seeds]
        own = pooled([[row.em for row in run] for run in runs])
        change = difference(own, base)
        return {
            "em": fmean(own),
            "base_em": fmean(base),
            "change": _plain(change) | {"met": change.low >= -LOSS},
            "n": len(base),
        }


def choose(rows: Rows, recipes: Mapping[str, Sequence[str]]) -> tuple[str, dict[str, float]]:
    """The recipe with the highest adjusted F1 over its seeds, and the adjusted F1 of all."""
    kept = [i for i, row in enumerate(rows[FULL]) if row.f1 > 0]
    scores = {
        name: fmean(rows[label][i].f1 for label in labels for i in kept)
        for name, labels in recipes.items()
    }
    return max(scores, key=scores.__getitem__), scores


def pooled(runs: Sequence[Sequence[float]]) -> list[float]:
    """Mean score per question over several seeds: more seeds are not more questions."""
    return [fmean(same) for same in zip(*runs, strict=True)]


def _by_kind(runs: Sequence[Sequence[Row]]) -> dict[str, float]:
    kinds = dict.fromkeys(row.kind for row in runs[0])
    return {k: fmean(row.em for run in runs for row in run if row.kind == k) for k in kinds}


def _plain(interval: Interval | None) -> dict[str, Any] | None:
    return interval and {"mean": interval.mean, "ci95": interval.ci95}


def _of(scores: Mapping[str, Sequence[float]], *names: str) -> dict[str, Any] | None:
    return _plain(recovered_gap(*(scores[name] for name in names)))
