"""RULER's examples of a given length: as much context as fits, then cut into chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

from transformers import PreTrainedTokenizerBase

from blocktune.data.example import RagExample
from blocktune.data.ruler.chains import make_chain
from blocktune.data.ruler.counting import make_common_words, make_frequent_words
from blocktune.data.ruler.documents import Library, make_qa, read_hotpot, read_squad
from blocktune.data.ruler.fit import count_tokens, largest, shrunk
from blocktune.data.ruler.haystack import Essay
from blocktune.data.ruler.niah import make_niah
from blocktune.data.ruler.problem import Problem, cut
from blocktune.data.ruler.tasks import RULER_TASKS, RulerTask

Maker = Callable[[Random, int], Problem]
"""From a source of randomness and a size to a problem."""


@dataclass(frozen=True)
class RulerConfig:
    """What to generate.

    Attributes:
        task: A name of `RULER_TASKS`.
        length: Tokens of the prompt with the longest answer, as RULER counts.
        n: Examples.
        seed: Another seed gives others.
        chunk: Tokens of a chunk; documents of the QA tasks are chunks as they are.
        haystack: File of prose for the essay tasks; None generates prose.
        file: For qa_1 a file in SQuAD's format, for qa_2 one in HotpotQA's.
        tokenizer: Folder or Hub name of the tokenizer that counts; None takes the one at hand.

    Raises:
        ValueError: If a value is not accepted.
    """

    task: str
    length: int = 4096
    n: int = 100
    seed: int = 0
    chunk: int = 256
    haystack: str | None = None
    file: str | None = None
    tokenizer: str | None = None

    def __post_init__(self):
        if self.task not in RULER_TASKS:
            names = ", ".join(RULER_TASKS)
            raise ValueError(f"unknown task '{self.task}' of RULER; available: {names}")
        for name in ("length", "n", "chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"'{name}' must be at least 1, got {getattr(self, name)}")
        is_qa = self.task.startswith("qa_")
        if is_qa and self.file is None:
            wanted = "SQuAD" if self.task == "qa_1" else "HotpotQA"
            raise ValueError(f"'{self.task}' needs file=PATH, questions in {wanted}'s format")
        if not is_qa and self.file is not None:
            raise ValueError(f"'file' belongs to qa_1 and qa_2, not to '{self.task}'")
        niah = RULER_TASKS[self.task].niah
        if self.haystack is not None and (niah is None or niah.haystack != "essay"):
            raise ValueError(f"'haystack' is prose for the essay tasks, '{self.task}' has none")


def generate_ruler(config: RulerConfig, tokenizer: PreTrainedTokenizerBase) -> Iterator[RagExample]:
    """Yields ``config.n`` examples; example ``i`` is the same however many are drawn.

    ``meta`` says what the evaluation needs: ``scorer``, ``max_new_tokens``, RULER's ``instruction``
    and the ``lead`` that it opens the answer with; ``length`` is what the prompt came to.

    Args:
        config: What to generate.
        tokenizer: Counts tokens, of the prompt that the task's own `PromptFormat` makes.

    Raises:
        ValueError: If not even the smallest context fits, or a file is wrong.
    """
    task = RULER_TASKS[config.task]
    make_for = _makers(config, task)
    size = None
    for index in range(config.n):
        make = make_for(index)
        if size is None:
            size = _size_for(config, task, make, tokenizer)
        yield _fitted(config, task, make, size, index, tokenizer)


def _makers(config: RulerConfig, task: RulerTask) -> Callable[[int], Maker]:
    """Who makes example ``i``: questions over documents differ, all else is drawn."""
    if task.family in ("squad", "hotpotqa"):
        read = read_squad if task.family == "squad" else read_hotpot
        return _qa_makers(read(config.file), config)
    essay = Essay(config.haystack)
    makers: dict[str, Maker] = {
        "niah": lambda rng, size: make_niah(task.niah, rng, size, essay),
        "vt": make_chain,
        "cwe": lambda rng, size: make_common_words(rng, size, config.length),
        "fwe": lambda rng, size: make_frequent_words(
            rng, size, config.length - task.max_new_tokens
        ),
    }
    return lambda index: makers[task.family]


def _qa_makers(library: Library, config: RulerConfig) -> Callable[[int], Maker]:
    """RULER asks a file's questions in order, which are of few articles; here the seed orders."""
    count = len(library.questions)
    if config.n > count:
        raise ValueError(f"ruler: n={config.n} questions are wanted, the file has {count}")
    order = Random(f"ruler/{config.task}/{config.seed}").sample(range(count), count)
    return lambda index: (
        lambda rng, size: make_qa(library, library.questions[order[index]], rng, size)
    )


def _rng(config: RulerConfig, index: int) -> Random:
    return Random(f"ruler/{config.task}/{config.seed}/{index}")


def _size_for(config: RulerConfig, task: RulerTask, make: Maker, tokenizer) -> int:
    def fits(size: int) -> bool:
        problem = make(_rng(config, 0), size)
        return _length(config, task, problem, tokenizer) <= config.length

    size = largest(fits, task.least)
    if size is None:
        needed = _length(config, task, make(_rng(config, 0), task.least), tokenizer)
        raise ValueError(
            f"ruler: the smallest '{config.task}' has {needed} tokens with its answer, length is "
            f"{config.length}; give more"
        )
    make(_rng(config, 0), size + 1)  # refuses where only the file's end kept the prompt short
    return size


def _fitted(
    config: RulerConfig, task: RulerTask, make: Maker, size: int, index: int, tokenizer
) -> RagExample:
    """The problem at that size or, where its words are longer than the first one's, below it."""
    for smaller in shrunk(size, task.least):
        problem = make(_rng(config, index), smaller)
        length = _length(config, task, problem, tokenizer)
        if length <= config.length:
            return _example(config, task, problem, index, length, tokenizer)
    raise ValueError(
        f"ruler: example {index} of '{config.task}' has {length} tokens at its smallest, length is "
        f"{config.length}; give more"
    )


def _length(config: RulerConfig, task: RulerTask, problem: Problem, tokenizer) -> int:
    pieces = cut(problem, config.chunk, tokenizer)
    return task.max_new_tokens + count_tokens(
        tokenizer, task.format, pieces.chunks, problem.question
    )


def _example(
    config: RulerConfig, task: RulerTask, problem: Problem, index: int, length: int, tokenizer
) -> RagExample:
    pieces = cut(problem, config.chunk, tokenizer)
    return RagExample(
        question=problem.question,
        chunks=pieces.chunks,
        answers=problem.answers,
        response=", ".join(problem.answers) if task.scorer == "ruler_recall" else None,
        kind=config.task,
        id=f"{config.task}-{config.length}-{config.seed}-{index}",
        supporting=pieces.supporting,
        meta={
            "scorer": task.scorer,
            "max_new_tokens": task.max_new_tokens,
            "instruction": task.instruction,
            "lead": problem.lead,
            "length": length,
        },
    )
