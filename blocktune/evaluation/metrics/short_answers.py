"""Scores of a short answer: exact match, word F1, substring match, and F1 over token ids."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


class Scores(NamedTuple):
    """The scores that every question gets, each in [0, 1]."""

    em: float
    f1: float
    substring_em: float


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
    return best(lambda answer: float(predicted == normalize_answer(answer)), answers)


def word_f1(prediction: str, answers: Sequence[str]) -> float:
    """F1 of the bags of normalised words; two empty bags agree, one empty bag scores 0.

    Source: ``compute_f1`` of SQuAD's evaluation script, v2.0.
    """
    predicted = normalize_answer(prediction).split()
    return best(lambda answer: bag_f1(predicted, normalize_answer(answer).split()), answers)


def qa_f1(prediction: str, answers: Sequence[str]) -> float:
    """`word_f1`, except that two empty bags score 0.

    Source: ``qa_f1_score`` of LongBench, arXiv:2308.14508, as EPIC and kvpress report it.
    """
    found = word_f1(prediction, answers)
    return found if normalize_answer(prediction) else 0.0


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

    return best(contained, answers)


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


def best(metric: Callable[[str], float], answers: Sequence[str]) -> float:
    """The highest score over the accepted answers.

    Raises:
        ValueError: If there is none.
    """
    require_answers(answers)
    return max(map(metric, answers))


def require_answers(answers: Sequence[str]) -> None:
    """Refuses a question that nothing could be right for.

    Raises:
        ValueError: If there is no accepted answer.
    """
    if not answers:
        raise ValueError("cannot score without an accepted answer; give the example 'answers'")


def bag_f1(predicted: Sequence, wanted: Sequence) -> float:
    """F1 of two bags; two empty ones agree, one empty one scores 0."""
    if not predicted or not wanted:
        return float(predicted == wanted)
    shared = (Counter(predicted) & Counter(wanted)).total()
    if shared == 0:
        return 0.0
    precision, recall = shared / len(predicted), shared / len(wanted)
    return (2 * precision * recall) / (precision + recall)


def token_f1(prediction: str, answers: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> float:
    """F1 of the bags of token ids of the normalised texts, without the first token of each.

    Only the first line counts, and one that opens with yes or no counts as that word.

    Args:
        prediction: The output.
        answers: Accepted answers.
        tokenizer: The model's own; scores of different tokenizers do not compare.

    Source: ``compute_f1`` and ``parse_generation`` of github.com/YaoJiayi/CacheBlend,
    ``example/utils.py``. There the first token is dropped because it is BOS; a tokenizer that adds
    none (Qwen) would lose a word, so it is dropped only where it is BOS. Departure: a blank
    prediction is scored, where the source fails.
    """
    predicted = _ids(tokenizer, normalize_answer(first_line(prediction)))
    return best(
        lambda answer: bag_f1(predicted, _ids(tokenizer, normalize_answer(answer))), answers
    )


def first_line(text: str) -> str:
    """The first line, shortened to yes or no where it opens so."""
    line = text.lstrip("\n").split("\n")[0]
    if line.startswith(("Yes", "yes")):
        return "Yes"
    # The source looks for "No" behind leading space, but for "Yes" only at the very start.
    if line.split() and line.split()[0].startswith(("No", "no")):
        return "No"
    return line


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids = list(tokenizer(text)["input_ids"])
    opens = bool(ids) and ids[0] == tokenizer.bos_token_id
    return ids[1:] if opens else ids
