"""Counting words: the ten most common of a list, the three most frequent of a coded text."""

from __future__ import annotations

import string
from random import Random

import numpy as np

from blocktune.data.ruler.problem import Problem
from blocktune.data.ruler.words import draw_distinct, draw_letters, draw_name, words_of

NUM_COMMON = 10
SHORT = 4096
"""Below so many tokens RULER repeats words less often."""
CWE_INSTRUCTION = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often."
)
_CWE_QUESTION = f"What are the {NUM_COMMON} most common words in the above list?"
_CWE_LEAD = f"Answer: The top {NUM_COMMON} words that appear most often in the list are:"
_ALPHA = 2.0
_CODED_LETTERS = 6
_TERMS = 100_000


def make_common_words(rng: Random, size: int, length: int) -> Problem:
    """A numbered list in which ten of ``size`` words appear more often; a solved one before it.

    RULER takes other English words where its first list is too short; here those are compounds
    (``amber-anchor``).

    Args:
        rng: Source of everything.
        size: Different words, more than ten.
        length: Tokens of the prompt with its answer; short ones repeat words 6 to 1 times, others
            30 to 3.
    """
    few = length < SHORT
    shown, answer = _list(rng, 20 if few else 40, (3, 1) if few else (10, 3))
    example = [CWE_INSTRUCTION, " ".join(shown), f"Question: {_CWE_QUESTION}"]
    example.append(f"{_CWE_LEAD} {' '.join(f'{i}. {w}' for i, w in enumerate(answer, start=1))}")
    units, common = _list(rng, size, (6, 1) if few else (30, 3))
    return Problem(units, " ", _CWE_QUESTION, common, example="\n".join(example), lead=_CWE_LEAD)


def make_frequent_words(rng: Random, size: int, length: int) -> Problem:
    """A text of made-up words whose frequency falls with the square of their rank.

    The most frequent is written ``...`` and is noise; the three after it are the answer.

    Args:
        rng: Source of everything.
        size: About as many words, the noise included.
        length: Tokens of the prompt without its answer; a fiftieth of it is the vocabulary.
    """

    def draw() -> str:
        return draw_letters(rng, _CODED_LETTERS, string.ascii_lowercase)

    vocabulary = ["...", *draw_distinct(draw, max(3, length // 50 - 1))]
    ranks = np.arange(1, len(vocabulary) + 1, dtype=np.float64)
    counts = (size * ranks**-_ALPHA / _zeta(_ALPHA)).astype(int)
    units = [word for word, times in zip(vocabulary, counts, strict=True) for _ in range(times)]
    rng.shuffle(units)
    return Problem(
        units=units,
        joiner=" ",
        question=(
            "Do not provide any explanation. Please ignore the dots '....'. What are the three "
            "most frequently appeared words in the above coded text?"
        ),
        answers=tuple(vocabulary[1:4]),
        lead=(
            "Answer: According to the coded text above, the three most frequently appeared words "
            "are:"
        ),
    )


def _list(rng: Random, size: int, repeats: tuple[int, int]) -> tuple[list[str], tuple[str, ...]]:
    words = _draw_words(rng, size)
    common, others = words[:NUM_COMMON], words[NUM_COMMON:]
    entries = common * repeats[0] + others * repeats[1]
    rng.shuffle(entries)
    return [f"{i}. {word}" for i, word in enumerate(entries, start=1)], tuple(common)


def _draw_words(rng: Random, count: int) -> list[str]:
    known = sorted({word for part in ("noun", "adjective", "verb") for word in words_of(part)})
    words = rng.sample(known, min(count, len(known)))
    return words + draw_distinct(lambda: draw_name(rng), count - len(words))


def _zeta(alpha: float) -> float:
    """Riemann's zeta: the first terms, and an integral for the rest (off by less than 1e-10)."""
    terms = np.arange(1, _TERMS, dtype=np.float64) ** -alpha
    return float(terms.sum() + _TERMS ** (1 - alpha) / (alpha - 1) + _TERMS**-alpha / 2)
