"""ROUGE-L of summaries, by Google's rouge-score."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from blocktune.evaluation.metrics.short_answers import best


def rouge_l(prediction: str, answers: Sequence[str]) -> float:
    """F-measure of the longest common subsequence of stemmed words, the best over the answers.

    Source: Lin (2004), as CacheBlend computes it: package ``rouge-score`` with stemming.

    Raises:
        ModuleNotFoundError: Without the package, which comes with the extra ``eval``.
    """
    scorer = _scorer()
    return best(lambda answer: scorer.score(answer, prediction)["rougeL"].fmeasure, answers)


@cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True)
