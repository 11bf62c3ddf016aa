"""Metrics that score one answer, each with its source; `METRICS` lists those for tasks."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import NamedTuple
from unicodedata import normalize

from transformers import PreTrainedTokenizerBase

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_TO_SPACES = str.maketrans(dict.fromkeys(string.punctuation, " "))


def normalize_answer(text: str) -> str:
    """Lower-cases, removes ASCII punctuation, then articles, and collapses white space.

    Source: ``normalize_answer`` of SQuAD's evaluation script (v1.1 and v2.0 are the same).
    Departure: accents are composed first (NFC), so an answer in either Unicode form is the same.
    """
    lowered = normalize("NFC", text).lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", lowered).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 if the normalised prediction equals a normalised answer, else 0: SQuAD's exact match."""
    predicted = normalize_answer(prediction)
    return best(lambda answer: float(predicted == normalize_answer(answer)), answers)


def word_f1(prediction: str, answers: Sequence[str]) -> float:
    """F1 of the bags of normalised words: ``compute_f1`` of SQuAD's evaluation script, v2.0."""
    predicted = normalize_answer(prediction).split()
    return best(lambda answer: bag_f1(predicted, normalize_answer(answer).split()), answers)


def qa_f1(prediction: str, answers: Sequence[str]) -> float:
    """`word_f1`, but two empty bags score 0: ``qa_f1_score`` of LongBench (arXiv:2308.14508)."""
    return word_f1(prediction, answers) if normalize_answer(prediction) else 0.0


def chatrag_f1(prediction: str, answers: Sequence[str]) -> float:
    """`qa_f1` with punctuation as spaces: ChatRAG-Bench (arXiv:2401.10225), as APE scores it."""
    spaced = [text.translate(_TO_SPACES) for text in (prediction, *answers)]
    return qa_f1(spaced[0], spaced[1:])


def substring_em(prediction: str, answers: Sequence[str]) -> float:
    """1 if a normalised answer is a substring of the normalised prediction, else 0.

    Source: ``best_subspan_em`` of Lost in the Middle (arXiv:2307.03172), as Block-Attention and
    KVLink use it. Departure: an answer that is empty once normalised only matches an empty one.
    """
    predicted, wanted = normalize_answer(prediction), map(normalize_answer, answers)
    return best(lambda own: float(own in predicted if own else not predicted), list(wanted))


def extract_answer(text: str) -> str:
    """An answer without surrounding white space and one final period."""
    return text.strip().removesuffix(".").rstrip()


def best(metric: Callable[[str], float], answers: Sequence[str], of: Callable = max) -> float:
    """The highest score over the accepted answers; raises ValueError if there is none."""
    if not answers:
        raise ValueError("cannot score without an accepted answer; give the example 'answers'")
    return of(map(metric, answers))


def bag_f1(predicted: Sequence, wanted: Sequence) -> float:
    """F1 of two bags (multisets); two empty bags score 1, one empty bag 0."""
    if not predicted or not wanted:
        return float(predicted == wanted)
    shared = (Counter(predicted) & Counter(wanted)).total()
    if shared == 0:
        return 0.0
    precision, recall = shared / len(predicted), shared / len(wanted)
    return (2 * precision * recall) / (precision + recall)


def token_f1(prediction: str, answers: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> float:
    """F1 of the bags of token ids of the normalised texts, without BOS.

    Only the first line of the prediction counts; if it begins with yes or no, only that word.
    Scores of different tokenizers cannot be compared.

    Source: github.com/YaoJiayi/CacheBlend, ``example/utils.py``. Departures: the source always
    drops the first token, a word if the tokenizer adds no BOS, and fails on a blank prediction.
    """

    def ids(text: str) -> list[int]:
        own = list(tokenizer(normalize_answer(text))["input_ids"])
        return own[1:] if own[:1] == [tokenizer.bos_token_id] else own

    predicted = ids(first_line(prediction))
    return best(lambda answer: bag_f1(predicted, ids(answer)), answers)


def first_line(text: str) -> str:
    """The first line, shortened to "Yes" or "No" if it begins with that."""
    line = text.lstrip("\n").split("\n")[0]
    if line.startswith(("Yes", "yes")):
        return "Yes"
    # As in the source: "No" may follow white space, "Yes" must be at the very start.
    if line.split() and line.split()[0].startswith(("No", "no")):
        return "No"
    return line


def rouge_l(prediction: str, answers: Sequence[str]) -> float:
    """F-measure of the longest common subsequence of stemmed words, best over the answers.

    Source: Lin (2004), as CacheBlend computes it: the package ``rouge-score`` with stemming. It
    reads a-z and 0-9 only: ValueError for answers without any.
    """
    from rouge_score.rouge_scorer import RougeScorer

    if answers and not re.search("[a-z0-9]", " ".join(answers).lower()):
        text = f"{answers[0]!r:.60}"
        raise ValueError(f"rouge_l reads a-z and 0-9 only, and {text} has none; use token_f1")
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return best(lambda answer: scorer.score(answer, prediction)["rougeL"].fmeasure, answers)


def ruler_recall(prediction: str, answers: Sequence[str]) -> float:
    """Share of ``answers`` that occur in the output, ignoring case. Other metrics want one.

    Source: ``string_match_all`` of github.com/NVIDIA/RULER, ``scripts/eval``. RULER publishes the
    mean over examples in percent, rounded to two decimals.
    """
    text = re.sub(r"[\x00-\x1f]", "\n", prediction.strip()).strip().lower()
    return best(lambda answer: float(answer.lower() in text), answers, of=fmean)


class Metric(NamedTuple):
    """A score in [0, 1]."""

    title: str  # its name in tables
    # takes the output, the accepted answers and the model's tokenizer
    score: Callable[[str, Sequence[str], PreTrainedTokenizerBase], float]


def _plain(title: str, metric: Callable[[str, Sequence[str]], float]) -> Metric:
    return Metric(title, lambda prediction, answers, tokenizer: metric(prediction, answers))


METRICS = {
    "em": _plain("EM", exact_match),
    "f1": _plain("F1", word_f1),
    "substring_em": _plain("sub-EM", substring_em),
    "qa_f1": _plain("QA F1", qa_f1),
    "chatrag_f1": _plain("ChatRAG F1", chatrag_f1),
    "token_f1": Metric("token F1", token_f1),
    "rouge_l": _plain("ROUGE-L", rouge_l),
    "ruler_recall": _plain("recall", ruler_recall),
}
"""Metrics by their name in YAML. Plug-ins add their own."""


class AdjustedF1(NamedTuple):
    """Mean F1 over the examples on which full prefill scores above 0, and the filter's bias."""

    mean: float | None  # None if full prefill scores 0 on all examples
    num_kept: int | None  # number of examples on which full prefill scores above 0
    # the F1 dropped per kept example, by which the gap to full prefill widens; None if none is kept
    bias: float | None


def adjusted_f1(f1: Sequence[float], full_prefill_f1: Sequence[float]) -> AdjustedF1:
    """What reuse loses on questions that the model can answer; F1 scores of the same examples.

    The filter also keeps what full prefill got right by luck, so report the raw F1 and the ``bias``
    as well. Source: arXiv:2603.20218, evaluation.
    """
    pairs = list(zip(f1, full_prefill_f1, strict=True))
    kept = [own for own, full in pairs if full > 0]
    dropped = sum(own for own, full in pairs if full == 0)
    n = len(kept)
    return AdjustedF1(sum(kept) / n, n, dropped / n) if kept else AdjustedF1(None, 0, None)
