"""Varied contexts for the same question: chunk order, chunk count, number of distractors.

Block dropout and position offsets change the layout, not the text: see `LayoutSpec`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random

from blocktune.data.answers import chunk_mentions, evidence
from blocktune.data.example import RagExample
from blocktune.prompt.format import Chunk

Range = tuple[int, int]


@dataclass(frozen=True)
class Augment:
    """How contexts are varied; chunks with `evidence` are never dropped."""

    shuffle: bool = False  # put the chunks into a random order
    num_chunks: Range | None = None  # chunks in the context: N, or [low, high]; None: as it is
    num_distractors: Range | None = None  # the same for chunks that hold no evidence. Not both
    seed: int = 0  # of all draws; example ``i`` of a source is always varied in the same way

    def __post_init__(self):
        for name, least in (("num_chunks", 1), ("num_distractors", 0)):
            if (value := getattr(self, name)) is not None:
                both = [value] * 2 if type(value) is int else value
                whole = isinstance(both, list | tuple) and [type(v) for v in both] == [int, int]
                if not whole or not least <= both[0] <= both[1]:
                    raise ValueError(
                        f"augment '{name}' must be a number of at least {least} or [low, high], "
                        f"got {value!r}"
                    )
                object.__setattr__(self, name, tuple(both))
        if self.num_chunks and self.num_distractors:
            raise ValueError("augment: give num_chunks or num_distractors, not both")


def augment(
    example: RagExample, index: int, how: Augment, pool: Sequence[Chunk] = ()
) -> RagExample:
    """A new example with a varied context; its number ``index`` and ``how.seed`` decide all draws.

    Distractors come from the ``pool`` of other examples' chunks if its own are too few, except
    those that mention an accepted answer or are in the context already. Raises ValueError if there
    are too few for the number that was drawn.
    """
    rng = Random(f"augment/{how.seed}/{index}")
    needed = evidence(example)
    chosen = [(chunk, i in example.supporting) for i, chunk in enumerate(example.chunks)]
    if drawn := how.num_distractors or how.num_chunks:
        count = rng.randint(*drawn) - (0 if how.num_distractors else len(needed))
        count = max(0, count)
        own = [i for i in range(len(chosen)) if i not in needed]
        kept = needed.union(rng.sample(own, min(count, len(own))))
        chosen = [pair for i, pair in enumerate(chosen) if i in kept]
        added = _draw(rng, example, count + len(needed) - len(chosen), pool)
        for chunk in added:  # anywhere, so that those of others are not always last
            chosen.insert(rng.randint(0, len(chosen)), (chunk, False))
    if how.shuffle:
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
    """A random order of ``range(size)``, computed lazily since pools are large."""
    moved: dict[int, int] = {}
    for here in range(size):
        there = rng.randrange(here, size)
        yield moved.get(there, there)
        moved[there] = moved.get(here, here)
