"""Data augmentation of contexts: chunk order, number of chunks, number of distractors.

Block dropout and position jitter change the layout, not the text: see `LayoutSpec`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random

from blocktune.data.answers import chunk_mentions, evidence
from blocktune.data.example import RagExample
from blocktune.prompt.format import Chunk


@dataclass(frozen=True)
class Augment:
    """How contexts are varied. Chunks with `evidence` are never dropped."""

    shuffle: bool = False  # put the chunks into a random order
    num_chunks: tuple[int, int] | None = None  # number of chunks, N or [low, high]; None: unchanged
    num_distractors: tuple[int, int] | None = None  # chunks without evidence; excludes num_chunks
    seed: int = 0  # example ``i`` of a source is always varied in the same way

    def __post_init__(self):
        for name, least in (("num_chunks", 1), ("num_distractors", 0)):
            if (value := getattr(self, name)) is not None:
                pair = [value] * 2 if type(value) is int else value
                valid = isinstance(pair, list | tuple) and [type(v) for v in pair] == [int, int]
                if not valid or not least <= pair[0] <= pair[1]:
                    raise ValueError(
                        f"augment '{name}' must be a number of at least {least} or [low, high], "
                        f"got {value!r}"
                    )
                object.__setattr__(self, name, tuple(pair))
        if self.num_chunks and self.num_distractors:
            raise ValueError("augment: give num_chunks or num_distractors, not both")


def augment(
    example: RagExample, index: int, config: Augment, pool: Sequence[Chunk] = ()
) -> RagExample:
    """Returns the example with a varied context; ``index`` and ``config.seed`` seed all draws.

    Missing distractors are drawn from ``pool``, the chunks of other examples, except those that
    mention an accepted answer or are in the context. Raises ValueError if the pool has too few.
    """
    rng = Random(f"augment/{config.seed}/{index}")
    needed = evidence(example)
    chosen = [(chunk, i in example.supporting) for i, chunk in enumerate(example.chunks)]
    if bounds := config.num_distractors or config.num_chunks:
        count = max(0, rng.randint(*bounds) - (0 if config.num_distractors else len(needed)))
        own = [i for i in range(len(chosen)) if i not in needed]
        kept = needed.union(rng.sample(own, min(count, len(own))))
        chosen = [pair for i, pair in enumerate(chosen) if i in kept]
        added = _draw(rng, example, count + len(needed) - len(chosen), pool)
        for chunk in added:  # at random places, so that added chunks are not always last
            chosen.insert(rng.randint(0, len(chosen)), (chunk, False))
    if config.shuffle:
        rng.shuffle(chosen)
    supporting = tuple(i for i, (_, supports) in enumerate(chosen) if supports)
    return replace(example, chunks=tuple(chunk for chunk, _ in chosen), supporting=supporting)


def _draw(rng: Random, example: RagExample, count: int, pool: Sequence[Chunk]) -> list[Chunk]:
    present = set(example.chunks)
    drawn: list[Chunk] = []
    for index in _shuffled(rng, len(pool)):
        if len(drawn) >= count:
            break
        chunk = pool[index]
        if chunk not in present and not chunk_mentions(chunk, example.answers):
            present.add(chunk)
            drawn.append(chunk)
    if len(drawn) < count:
        raise ValueError(
            f"augment: example '{example.id or example.question:.40}' needs {count} chunks of "
            f"other examples, {len(drawn)} fit; load more examples, or ask for fewer chunks"
        )
    return drawn


def _shuffled(rng: Random, size: int) -> Iterator[int]:
    """Yields ``range(size)`` in random order, by a lazy Fisher-Yates shuffle: pools are large."""
    swapped: dict[int, int] = {}
    for position in range(size):
        target = rng.randrange(position, size)
        yield swapped.get(target, target)
        swapped[target] = swapped.get(position, position)
