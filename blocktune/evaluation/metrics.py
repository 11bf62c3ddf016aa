"""How an answer is scored: exact match, word F1, substring match, adjusted F1.

A score is a float in [0, 1] and, over several accepted answers, the best of them.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


class Scores(NamedTuple):
    """The scores of one prediction, each in [0, 1]."""

    em: float
    f1: float
    substring_em: float


class AdjustedF1(NamedTuple):
    """Mean F1 over the examples that full prefill does not fail; None when it fails all."""

    mean: float | None
    num_kept: int


def normalize_answer(text: str) -> str:
    """Lowers case, drops ASCII punctuation, then articles, and squeezes spaces, in that order.

    Source: ``normalize_answer`` of SQuAD's evaluation script (v1.1 and v2.0 are the same).
    """
    lowered = text.lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", lowered).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 if the normalised prediction equals a normalised answer.

    Source: ``compute_exact`` of SQuAD's evaluation script.
    """
    predicted = normalize_answer(prediction)
    return _best(lambda answer: float(predicted == normalize_answer(answer)), answers)


def word_f1(prediction: str, answers: Sequence[str]) -> float:
    """F1 of the bags of normalised words; two empty bags agree, one empty bag scores 0.

    Source: ``compute_f1`` of SQuAD's evaluation script, v2.0. LongBench's ``qa_f1_score`` is the
    same but for two empty bags, which it scores 0.
    """
    predicted = normalize_answer(prediction).split()
    return _best(lambda answer: _bag_f1(predicted, normalize_answer(answer).split()), answers)


def substring_em(prediction: str, answers: Sequence[str]) -> float:
    """1 if a normalised answer stands, as characters, anywhere in the normalised prediction.

    Source: ``best_subspan_em`` of Lost in the Middle (arXiv:2307.03172), as Block-Attention and
    KVLink use it. Departure: an answer that normalises to nothing only matches nothing, where
    the source finds it in every prediction.
    """
    predicted = normalize_answer(prediction)

    def contained(answer: str) -> float:
        wanted = normalize_answer(answer)
        return float(wanted in predicted if wanted else not predicted)

    return _best(contained, answers)


def extract_answer(text: str, marker: str | None = None) -> str:
    """What is scored of a model's output.

    Args:
        text: The output, e.g. ``'Anna Belt. Answer: Port Alder.'``.
        marker: What announces the answer (``'Answer:'``); None scores the whole output.

    Returns:
        The text after the last ``marker``, without surrounding space and one final period; the
        whole output, stripped likewise, when it does not hold the marker.
    """
    answer = text.rpartition(marker)[2] if marker else text
    return answer.strip().removesuffix(".").rstrip()


def score(prediction: str, answers: Sequence[str]) -> Scores:
    """Scores an extracted answer against the accepted ones.

    Raises:
        ValueError: If there is no accepted answer.
    """
    metrics = (exact_match, word_f1, substring_em)
    return Scores(*(metric(prediction, answers) for metric in metrics))


def adjusted_f1(f1: Sequence[float], full_prefill_f1: Sequence[float]) -> AdjustedF1:
    """Mean F1 over the examples on which full prefill scores above zero.

    It asks what reuse loses of what the model could do, and so drops questions that the model
    cannot answer. The filter looks at full prefill's own luck and thus favours it: read it
    beside the raw F1.

    Args:
        f1: The method's F1 per example.
        full_prefill_f1: Full prefill's F1 on the same examples.

    Source: arXiv:2603.20218, evaluation set-up.
    """
    pairs = zip(f1, full_prefill_f1, strict=True)
    kept = [own for own, full in pairs if full > 0]
    return AdjustedF1(sum(kept) / len(kept) if kept else None, len(kept))


def _best(metric: Callable[[str], float], answers: Sequence[str]) -> float:
    if not answers:
        raise ValueError("cannot score without an accepted answer; give the example 'answers'")
    return max(map(metric, answers))


def _bag_f1(predicted: list[str], wanted: list[str]) -> float:
    if not predicted or not wanted:
        return float(predicted == wanted)
    shared = (Counter(predicted) & Counter(wanted)).total()
    if shared == 0:
        return 0.0
    precision, recall = shared / len(predicted), shared / len(wanted)
    return (2 * precision * recall) / (precision + recall)
