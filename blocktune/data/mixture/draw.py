"""From a mixture to examples in training order, the same every time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from random import Random
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from blocktune.data.augment import augment
from blocktune.data.example import RagExample
from blocktune.data.mixture.config import BLOCK, FULL, MODES, Mixture, Part
from blocktune.data.sources import load_examples, training_split


class MixedExample(NamedTuple):
    """An example, the attention it is trained in (``block`` or ``full``), and its part's number."""

    example: RagExample
    mode: str
    part: int


class PartCount(NamedTuple):
    """What a part gave: rows loaded, examples taken in each mode, and how often each row was."""

    source: str
    loaded: int
    block: int
    full: int
    epochs: float


class Mixed(NamedTuple):
    """A drawn mixture: examples in training order, and what each part gave."""

    examples: list[MixedExample]
    parts: list[PartCount]


def mix(mixture: Mixture, *, tokenizer: PreTrainedTokenizerBase | None = None) -> Mixed:
    """Loads all parts, draws and shuffles.

    A part's rows are taken in a seeded order, each once before any is taken again; augmentation
    draws anew every time. Under duplication an example stands with the same context in both modes.

    Args:
        mixture: What to mix.
        tokenizer: Of the model, for chunkers and generators that count tokens.

    Raises:
        ValueError: As the loaders and `augment` do; or if a part's weight takes no example of it.
    """
    loaded = [_load(part, tokenizer) for part in mixture.parts]
    wanted = _counts(mixture, [len(examples) for examples in loaded])
    drawn: list[MixedExample] = []
    counts: list[PartCount] = []
    for number, part in enumerate(mixture.parts):
        examples, size, modes = loaded[number], wanted[number], MODES[part.mode]
        taken = _take(examples, size, part, Random(f"mix/{mixture.seed}/{number}"))
        drawn += [MixedExample(example, mode, number) for example in taken for mode in modes]
        given = {mode: size if mode in modes else 0 for mode in (BLOCK, FULL)}
        epochs = size / len(examples)
        counts.append(PartCount(part.source, len(examples), given[BLOCK], given[FULL], epochs))
    Random(f"mix/{mixture.seed}").shuffle(drawn)
    return Mixed(drawn, counts)


def _load(part: Part, tokenizer: PreTrainedTokenizerBase | None) -> list[RagExample]:
    return load_examples(
        part.source,
        limit=part.limit,
        split=part.split or training_split(part.source),
        tokenizer=tokenizer,
        chunker=part.chunker,
    )


def _counts(mixture: Mixture, available: Sequence[int]) -> list[int]:
    """Examples to take of each part, in all exactly ``size`` under sampling."""
    weights = [part.weight for part in mixture.parts]
    if mixture.size is None:
        counts = [round(weight * rows) for weight, rows in zip(weights, available, strict=True)]
    else:
        counts = _share_out(mixture.size, weights)
    for part, number, rows in zip(mixture.parts, counts, available, strict=True):
        if not number or not rows:
            raise ValueError(
                f"mixture: no example of '{part.source}' is taken: it has {rows}, weight "
                f"{part.weight:g}; give more weight, a larger size, or drop the part"
            )
    return counts


def _share_out(size: int, weights: Sequence[float]) -> list[int]:
    """Whole numbers in proportion to the weights, by largest remainder, that add up to ``size``."""
    exact = [size * weight / sum(weights) for weight in weights]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
    for index in by_remainder[: size - sum(counts)]:
        counts[index] += 1
    return counts


def _take(examples: Sequence[RagExample], size: int, part: Part, rng: Random) -> list[RagExample]:
    pool = list(dict.fromkeys(chunk for e in examples for chunk in e.chunks))
    return [
        augment(examples[index], turn * len(examples) + index, part.augment, pool)
        if part.augment
        else examples[index]
        for (turn, index), _ in zip(_turns(len(examples), rng), range(size), strict=False)
    ]


def _turns(rows: int, rng: Random) -> Iterator[tuple[int, int]]:
    """Turn and row, every row once a turn, in an order of its own."""
    for turn in count():
        for index in rng.sample(range(rows), rows):
            yield turn, index
