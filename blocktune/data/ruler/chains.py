"""Variable tracking: one value, handed from name to name."""

from __future__ import annotations

from itertools import pairwise
from random import Random

from blocktune.data.ruler.haystack import NOISE
from blocktune.data.ruler.problem import Problem
from blocktune.data.ruler.words import draw_distinct, draw_letters, draw_number

HOPS = 4
EXAMPLE_LINES = 5
INSTRUCTION = "Memorize and track the chain(s) of variable assignment hidden in the following text."


def make_chain(rng: Random, size: int) -> Problem:
    """A chain of five variables among ``size`` lines of filler, a solved one before it.

    RULER's solved example fills 500 tokens; this one has `EXAMPLE_LINES` lines, the same for all
    lengths.
    """
    shown, value, names, _ = _hide(rng, EXAMPLE_LINES, letters=3)
    example = "\n".join([INSTRUCTION, "", *shown, _question(value), f"{_lead(value)} {names}"])
    units, value, names, marks = _hide(rng, size, letters=5)
    return Problem(
        units=units,
        joiner="\n",
        question=_question(value).removeprefix("Question: "),
        answers=tuple(names.split()),
        marks=marks,
        example=example,
        lead=_lead(value),
    )


def _hide(rng: Random, size: int, letters: int) -> tuple[list[str], str, str, frozenset[int]]:
    names = draw_distinct(lambda: draw_letters(rng, letters), HOPS + 1)
    value = draw_number(rng, 5)
    steps = [f"VAR {names[0]} = {value}"]
    steps += [f"VAR {new} = VAR {old}" for old, new in pairwise(names)]
    units = [NOISE] * size
    places = sorted(rng.sample(range(max(size, len(steps))), len(steps)))
    for number, (place, step) in enumerate(zip(places, steps, strict=True)):
        units.insert(place + number, step)
    return units, value, " ".join(names), frozenset(units.index(step) for step in steps)


def _question(value: str) -> str:
    return f"Question: Find all variables that are assigned the value {value} in the text above."


def _lead(value: str) -> str:
    return (
        f"Answer: According to the chain(s) of variable assignment in the text above, {HOPS + 1} "
        f"variables are assigned the value {value}, they are:"
    )
