"""RULER's scorers: which of the wanted strings stand in the output."""

from __future__ import annotations

import re
from collections.abc import Sequence

from blocktune.evaluation.metrics.short_answers import require_answers

_CONTROL = re.compile(r"[\x00-\x1f]")


def ruler_recall(prediction: str, answers: Sequence[str]) -> float:
    """Share of the wanted strings that stand in the output, whatever their case.

    Every entry of ``answers`` is wanted: the values of a needle, the words of a list.

    Source: ``string_match_all`` of github.com/NVIDIA/RULER, ``scripts/eval``; its mean over
    examples, in percent and rounded to two places, is the published number.
    """
    return sum(_found(prediction, answers)) / len(answers)


def ruler_any(prediction: str, answers: Sequence[str]) -> float:
    """1 if any of the accepted answers stands in the output, whatever its case.

    Source: ``string_match_part`` of github.com/NVIDIA/RULER, for its question answering tasks.
    """
    return max(_found(prediction, answers))


def _found(prediction: str, answers: Sequence[str]) -> list[float]:
    require_answers(answers)
    text = _CONTROL.sub("\n", prediction.strip()).strip().lower()
    return [float(answer.lower() in text) for answer in answers]
