"""The table of metrics that a task can name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from blocktune.evaluation.metrics.rouge import rouge_l
from blocktune.evaluation.metrics.ruler import ruler_any, ruler_recall
from blocktune.evaluation.metrics.short_answers import (
    exact_match,
    qa_f1,
    substring_em,
    token_f1,
    word_f1,
)

ScoreText = Callable[[str, Sequence[str], PreTrainedTokenizerBase], float]


class Metric(NamedTuple):
    """A score of one output in [0, 1].

    Attributes:
        title: As tables call it.
        source: Whose definition it is.
        score: From the output, the accepted answers and the model's tokenizer.
        binary: Whether it is 0 or 1, so that McNemar's test applies.
    """

    title: str
    source: str
    score: ScoreText
    binary: bool = False


def _plain(metric: Callable[[str, Sequence[str]], float]) -> ScoreText:
    return lambda prediction, answers, tokenizer: metric(prediction, answers)


SQUAD = "SQuAD v2.0 evaluation script"
METRICS = {
    "em": Metric("EM", SQUAD, _plain(exact_match), binary=True),
    "f1": Metric("F1", SQUAD, _plain(word_f1)),
    "substring_em": Metric("sub-EM", "arXiv:2307.03172", _plain(substring_em), binary=True),
    "qa_f1": Metric("QA F1", "LongBench, arXiv:2308.14508", _plain(qa_f1)),
    "token_f1": Metric("token F1", "CacheBlend's code", token_f1),
    "rouge_l": Metric("ROUGE-L", "rouge-score", _plain(rouge_l)),
    "ruler_recall": Metric("recall", "RULER, string_match_all", _plain(ruler_recall)),
    "ruler_any": Metric("found", "RULER, string_match_part", _plain(ruler_any), binary=True),
}
"""By the name that YAML uses."""


def require_metrics(names: Iterable[str]) -> None:
    """Refuses names that no metric has.

    Raises:
        ValueError: Naming the first of them.
    """
    for name in names:
        if name not in METRICS:
            raise ValueError(f"unknown metric '{name}'; available: {', '.join(METRICS)}")
