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
    examples: Iterable[RagExample],
    *,
    shots: int,
    seed: int = 0,
    others: Iterable[RagExample] | None = None,
) -> Iterator[RagExample]:
    """Gives every instance other instances as chunks, never itself.

    Args:
        examples: Each with one chunk: itself, solved.
        shots: Chunks per example.
        seed: Chooses them; example ``i`` gets the same ones however many are drawn.
        others: Where shots come from, another split for one; None takes the examples themselves.

    Raises:
        ValueError: If there are too few instances.
    """
    examples = iter(examples)
    pool = list(islice(examples if others is None else others, POOL))
    spare = shots + (others is None)
    if len(pool) < spare:
        raise ValueError(f"{shots} shots need {spare} instances, got {len(pool)}; lower shots")
    for index, example in enumerate(examples if others is not None else chain(pool, examples)):
        drawn = Random(f"shots/{seed}/{index}").sample(range(len(pool)), spare)
        kept = drawn if others is not None else [i for i in drawn if i != index]
        yield replace(example, chunks=tuple(pool[i].chunks[0] for i in kept[:shots]))
