"""Few-shot examples as chunks: solved instances of the same source."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain, islice
from random import Random

from blocktune.data.example import RagExample

POOL = 1000
"""Instances that shots are drawn from: the first of a source, whatever its limit."""


def with_shots(
    examples: Iterable[RagExample], *, shots: int, seed: int = 0
) -> Iterator[RagExample]:
    """Gives every instance other instances as chunks, never itself.

    Args:
        examples: Each with one chunk: itself, solved.
        shots: Chunks per example.
        seed: Chooses them; example ``i`` gets the same ones however many are drawn.

    Raises:
        ValueError: If there are too few instances.
    """
    examples = iter(examples)
    pool = list(islice(examples, POOL))
    if pool and len(pool) <= shots:
        raise ValueError(f"{shots} shots need {shots + 1} instances, got {len(pool)}; lower shots")
    for index, example in enumerate(chain(pool, examples)):
        rng = Random(f"shots/{seed}/{index}")
        drawn = [i for i in rng.sample(range(len(pool)), shots + 1) if i != index]
        yield replace(example, chunks=tuple(pool[i].chunks[0] for i in drawn[:shots]))
