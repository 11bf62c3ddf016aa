"""Needles in a haystack: magic numbers or codes, hidden under keys."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from blocktune.data.ruler.haystack import NOISE, Essay
from blocktune.data.ruler.problem import Problem
from blocktune.data.ruler.words import draw_distinct, draw_name, draw_number, draw_uuid

NEEDLE = "One of the special magic {kind} for {key} is: {value}."
DEPTHS = tuple(round(100 * step / 39) for step in range(40))
"""Percent of the context at which needles may stand."""

_DRAWS: dict[str, Callable[[Random], str]] = {
    "words": draw_name,
    "numbers": draw_number,
    "uuids": draw_uuid,
}


@dataclass(frozen=True)
class Niah:
    """A variant of the task.

    Attributes:
        haystack: ``noise``, RULER's filler; ``essay``, prose; ``needle``, other needles.
        keys: Kind of the keys: ``words``, ``numbers`` or ``uuids``.
        values: Kind of the values.
        num_keys: Keys hidden.
        num_values: Values of each key.
        num_queries: Keys asked for; all their values are the answer.
    """

    haystack: str
    keys: str = "words"
    values: str = "numbers"
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1


def make_niah(
    task: Niah, rng: Random, size: int, essay: Essay, depths: Sequence[float] | None = None
) -> Problem:
    """Hides the needles.

    Args:
        task: The variant.
        rng: Source of all but the prose.
        size: Sentences of prose, or lines of filler.
        essay: The prose.
        depths: Where needles stand, percent; None draws them.
    """
    num_keys = max(task.num_keys, task.num_queries)
    keys = draw_distinct(lambda: _DRAWS[task.keys](rng), num_keys)
    values = draw_distinct(lambda: _DRAWS[task.values](rng), num_keys * task.num_values)
    owned = {k: values[i * task.num_values :][: task.num_values] for i, k in enumerate(keys)}
    needles = [_needle(task, key, value) for key in keys for value in owned[key]]
    rng.shuffle(needles)
    hay = _hay(task, rng, size, essay, set(keys))
    places = _places(task, rng, len(hay), len(needles), depths)
    units = list(hay)
    for place, needle in sorted(zip(places, needles, strict=True), reverse=True):
        units.insert(place, needle)
    asked = rng.sample(keys, task.num_queries)
    wanted = {_needle(task, key, value) for key in asked for value in owned[key]}
    kind = task.values if task.num_queries * task.num_values > 1 else task.values[:-1]
    question, lead = _ask(kind, asked, several=kind == task.values)
    return Problem(
        units=units,
        joiner=" " if task.haystack == "essay" else "\n",
        question=question,
        answers=tuple(value for key in asked for value in owned[key]),
        marks=frozenset(i for i, unit in enumerate(units) if unit in wanted),
        lead=lead,
    )


def _needle(task: Niah, key: str, value: str) -> str:
    return NEEDLE.format(kind=task.values, key=key, value=value)


def _hay(task: Niah, rng: Random, size: int, essay: Essay, taken: set[str]) -> list[str]:
    if task.haystack == "essay":
        return essay.first(size)
    if task.haystack == "noise":
        return [NOISE] * size
    others = draw_distinct(lambda: _DRAWS[task.keys](rng), size, taken)
    return [_needle(task, key, _DRAWS[task.values](rng)) for key in others]


def _places(
    task: Niah, rng: Random, size: int, count: int, depths: Sequence[float] | None
) -> list[int]:
    """Indices to insert before; RULER draws depths in prose and lines in filler."""
    if depths is None and task.haystack != "essay":
        return rng.sample(range(max(size, count)), count)
    depths = rng.sample(DEPTHS, count) if depths is None else depths
    return [int(size * depth / 100) for depth in depths]


def _ask(kind: str, keys: Sequence[str], several: bool) -> tuple[str, str]:
    named = keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])}, and {keys[-1]}"
    are, what = ("are", "What are all") if several else ("is", "What is")
    question = f"{what} the special magic {kind} for {named} mentioned in the provided text?"
    return question, f"The special magic {kind} for {named} mentioned in the provided text {are}"
