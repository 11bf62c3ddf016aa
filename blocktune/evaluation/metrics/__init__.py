"""How an answer is scored; each metric names its source, `METRICS` is what a task can ask for."""

from blocktune.evaluation.metrics.adjusted import AdjustedF1, FilterBias, adjusted_f1, filter_bias
from blocktune.evaluation.metrics.rouge import rouge_l
from blocktune.evaluation.metrics.ruler import ruler_any, ruler_recall
from blocktune.evaluation.metrics.short_answers import (
    Scores,
    exact_match,
    extract_answer,
    normalize_answer,
    qa_f1,
    score,
    substring_em,
    token_f1,
    word_f1,
)
from blocktune.evaluation.metrics.table import METRICS, Metric, require_metrics

__all__ = [
    "METRICS",
    "AdjustedF1",
    "FilterBias",
    "Metric",
    "Scores",
    "adjusted_f1",
    "exact_match",
    "extract_answer",
    "filter_bias",
    "normalize_answer",
    "qa_f1",
    "require_metrics",
    "rouge_l",
    "ruler_any",
    "ruler_recall",
    "score",
    "substring_em",
    "token_f1",
    "word_f1",
]
