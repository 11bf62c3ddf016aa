"""A generated question before its context is cut, and the cutting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from blocktune.prompt.format import Chunk


@dataclass(frozen=True)
class Problem:
    """A question over units of context that must not be torn apart.

    Attributes:
        units: Sentences, lines, words or documents, in order.
        joiner: What stands between two units of a chunk; None makes every unit a chunk.
        question: Can be understood without any instruction.
        answers: All that the answer must name, or any one of them, as the task's scorer says.
        marks: Indices of the units that hold the evidence.
        example: A solved question of the kind, the first chunk; None has none.
        lead: How the answer opens, which RULER writes for the model.
    """

    units: Sequence[str]
    joiner: str | None
    question: str
    answers: tuple[str, ...]
    marks: frozenset[int] = frozenset()
    example: str | None = None
    lead: str = ""


@dataclass(frozen=True)
class Cut:
    """The chunks of a problem, and which of them hold its evidence."""

    chunks: tuple[Chunk, ...]
    supporting: tuple[int, ...]


def cut(problem: Problem, size: int, tokenizer: PreTrainedTokenizerBase) -> Cut:
    """Packs units into chunks of up to ``size`` tokens, in order; a longer unit is a chunk alone.

    Args:
        problem: What to cut.
        size: Tokens of a chunk, the space between units included.
        tokenizer: Counts them.
    """
    groups = _groups(problem, size, tokenizer)
    joiner = problem.joiner or ""
    texts = [joiner.join(problem.units[i] for i in group) for group in groups]
    lead = [problem.example] if problem.example else []
    holding = (n for n, group in enumerate(groups) if problem.marks.intersection(group))
    supporting = tuple(len(lead) + number for number in holding)
    return Cut(tuple(Chunk(text) for text in [*lead, *texts]), supporting)


def _groups(problem: Problem, size: int, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    if problem.joiner is None:
        return [[index] for index in range(len(problem.units))]
    distinct = list(dict.fromkeys(problem.units))
    spelled = [unit + problem.joiner for unit in distinct]
    ids = tokenizer(spelled, add_special_tokens=False, verbose=False)["input_ids"]
    tokens = {unit: len(own) for unit, own in zip(distinct, ids, strict=True)}
    groups: list[list[int]] = []
    room = 0
    for index, unit in enumerate(problem.units):
        if not groups or tokens[unit] > room:
            groups.append([])
            room = size
        groups[-1].append(index)
        room -= tokens[unit]
    return groups
