"""Needle in a haystack over a grid: one needle, at every depth of every length."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from transformers import PreTrainedTokenizerBase

from blocktune.data.example import RagExample
from blocktune.data.ruler.fit import count_tokens, largest
from blocktune.data.ruler.haystack import Essay
from blocktune.data.ruler.niah import make_niah
from blocktune.data.ruler.problem import Problem, cut
from blocktune.data.ruler.tasks import RULER_TASKS

_TASK = RULER_TASKS["niah_single_2"]


@dataclass(frozen=True)
class NeedleConfig:
    """What to generate.

    Attributes:
        lengths: Tokens of the prompt with its answer.
        depths: Percent of the context before the needle.
        n: Examples of each length and depth.
        seed: Another seed gives other needles.
        chunk: Tokens of a chunk.
        haystack: File of prose; None generates prose.
        tokenizer: Folder or Hub name of the tokenizer that counts; None takes the one at hand.

    Raises:
        ValueError: If a value is not accepted.
    """

    lengths: tuple[int, ...] = (1024, 2048, 4096)
    depths: tuple[float, ...] = (0, 25, 50, 75, 100)
    n: int = 10
    seed: int = 0
    chunk: int = 256
    haystack: str | None = None
    tokenizer: str | None = None

    def __post_init__(self):
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"'lengths' must be at least 1, got {self.lengths}")
        if not self.depths or not all(0 <= depth <= 100 for depth in self.depths):
            raise ValueError(f"'depths' must be percent from 0 to 100, got {self.depths}")
        for name in ("n", "chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"'{name}' must be at least 1, got {getattr(self, name)}")


def generate_needles(
    config: NeedleConfig, tokenizer: PreTrainedTokenizerBase
) -> Iterator[RagExample]:
    """Yields the grid, length by length; ``kind`` names the cell: ``4096 tokens, depth 25 %``.

    Every cell of a seed hides the same needles in the same prose.

    Raises:
        ValueError: If a length does not even hold the question.

    Source: the needle of RULER's niah_single_2, at depths of its own.
    """
    essay = Essay(config.haystack)
    for length in config.lengths:
        for depth in config.depths:
            for index in range(config.n):
                yield _at(config, essay, length, depth, index, tokenizer)


def _at(
    config: NeedleConfig, essay: Essay, length: int, depth: float, index: int, tokenizer
) -> RagExample:
    def make(size: int) -> Problem:
        rng = Random(f"needle/{config.seed}/{index}")
        return make_niah(_TASK.niah, rng, size, essay, depths=[depth])

    def tokens(size: int) -> int:
        problem = make(size)
        chunks = cut(problem, config.chunk, tokenizer).chunks
        prompt = count_tokens(tokenizer, _TASK.format, chunks, problem.question)
        return prompt + _TASK.max_new_tokens

    size = largest(lambda size: tokens(size) <= length, least=1)
    if size is None:
        raise ValueError(f"needle: a prompt has at least {tokens(1)} tokens, got length {length}")
    problem = make(size)
    pieces = cut(problem, config.chunk, tokenizer)
    meta = {"scorer": _TASK.scorer, "max_new_tokens": _TASK.max_new_tokens}
    meta |= {"instruction": _TASK.instruction, "lead": problem.lead}
    return RagExample(
        question=problem.question,
        chunks=pieces.chunks,
        answers=problem.answers,
        kind=f"{length} tokens, depth {depth:g} %",
        id=f"needle-{length}-{depth:g}-{config.seed}-{index}",
        supporting=pieces.supporting,
        meta=meta | {"length": tokens(size), "depth": depth},
    )
