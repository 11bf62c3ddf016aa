"""Needle in a haystack: prompts over a grid of lengths and needle depths.

RULER's other tasks run in lm-eval with ``blocktune``'s model; see docs/data.md.
"""

from __future__ import annotations

import functools
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice, product
from random import Random

from transformers import PreTrainedTokenizerBase

from blocktune.data.chunking import sentences_of
from blocktune.data.example import RagExample
from blocktune.data.worlds import WorldConfig, generate_examples
from blocktune.prompt import Chunk, PromptFormat, make_pieces
from blocktune.registry import require_count

INSTRUCTION = (
    "A special magic number is hidden within the following text. Make sure to memorize it. I will "
    "quiz you about the number afterwards."
)
FORMAT = PromptFormat(
    instruction=INSTRUCTION, titled="{title}\n{text}\n", untitled="{text}\n", question="{question}"
)
"""RULER's wording, with which prompt lengths are computed."""
NEEDLE = "One of the special magic numbers for {key} is: {value}."
QUESTION = "What is the special magic number for {key} mentioned in the provided text?"
LEAD = "The special magic number for {key} mentioned in the provided text is"
"""Start of the answer, which RULER gives to the model."""
MAX_NEW_TOKENS = 128  # tokens reserved for the answer; RULER counts them as part of the length


@dataclass(frozen=True)
class NeedleConfig:
    """The grid of lengths and depths, and how its examples are made."""

    lengths: tuple[int, ...] = (1024, 2048, 4096)  # tokens of prompt and answer
    depths: tuple[float, ...] = (0, 25, 50, 75, 100)  # percent of the context before the needle
    n: int = 10  # examples per length and depth
    seed: int = 0  # of the needles
    chunk: int = 256  # tokens per chunk
    tokenizer: str | None = None  # folder or name; counts tokens; None: the model's

    def __post_init__(self):
        if not all(0 <= depth <= 100 for depth in self.depths):
            raise ValueError(f"'depths' must be percent from 0 to 100, got {self.depths}")
        for name, value in (("n", self.n), ("chunk", self.chunk)):
            require_count(f"'{name}'", value, 1)


def generate_needles(
    config: NeedleConfig, tokenizer: PreTrainedTokenizerBase
) -> Iterator[RagExample]:
    """Yields the examples, length by length. ``kind`` is the cell: ``4096 tokens, depth 25 %``.

    Every cell hides the same needles in the same text. Raises ValueError if a length is too short
    for the question.

    Source: RULER's niah_single_2 (arXiv:2404.06654), here with chosen depths, in chunks, and in
    generated text, since RULER's (Paul Graham's essays) may not be shipped.
    """
    source, sentences = _generated_sentences(), []

    def prose(number: int) -> list[str]:
        """The first ``number`` sentences of the source, the same in every call."""
        sentences.extend(islice(source, max(0, number - len(sentences))))
        return sentences[:number]

    for length, depth, index in product(config.lengths, config.depths, range(config.n)):
        yield _example(config, prose, length, depth, index, tokenizer)


@functools.cache
def _words(part: str) -> tuple[str, ...]:
    """All words of a part of speech in the library wonderwords, which RULER uses."""
    from wonderwords import RandomWord

    return tuple(RandomWord().filter(include_categories=[part]))


def _generated_sentences() -> Iterator[str]:
    for seed in count():
        for example in generate_examples(WorldConfig(split="test", seed=seed, num_examples=50)):
            for chunk in example.chunks:
                yield from (s.strip() for s in sentences_of(chunk.text) if s.strip())


def _example(
    config: NeedleConfig,
    prose: Callable[[int], list[str]],
    length: int,
    depth: float,
    index: int,
    tokenizer: PreTrainedTokenizerBase,
) -> RagExample:
    rng = Random(f"needle/{config.seed}/{index}")
    key = f"{rng.choice(_words('adjective'))}-{rng.choice(_words('noun'))}"
    needle = {"key": key, "value": str(rng.randint(10**6, 10**7 - 1))}
    question = QUESTION.format(**needle)

    def hide(size: int) -> tuple[tuple[Chunk, ...], int]:
        """Makes chunks of ``size`` sentences and the needle; also returns the needle's chunk."""
        sentences = prose(size)
        place = int(size * depth / 100)
        sentences.insert(place, NEEDLE.format(**needle))
        groups = pack(sentences, config.chunk, tokenizer)
        chunks = tuple(Chunk(" ".join(sentences[i] for i in group)) for group in groups)
        return chunks, next(n for n, group in enumerate(groups) if place in group)

    def tokens(size: int) -> int:
        pieces = make_pieces(tokenizer, FORMAT, hide(size)[0], question)
        return MAX_NEW_TOKENS + sum(map(len, (pieces.prefix, *pieces.chunks, pieces.query)))

    size = largest(lambda size: tokens(size) <= length)
    if size is None:
        raise ValueError(f"needle: a prompt has at least {tokens(1)} tokens, got length {length}")
    chunks, needle_chunk = hide(size)
    meta = {"scorer": "ruler_recall", "max_new_tokens": MAX_NEW_TOKENS, "instruction": INSTRUCTION}
    meta |= {"lead": LEAD.format(**needle), "length": tokens(size), "depth": depth}
    return RagExample(
        question,
        chunks,
        (needle["value"],),
        kind=f"{length} tokens, depth {depth:g} %",
        id=f"needle-{length}-{depth:g}-{config.seed}-{index}",
        supporting=(needle_chunk,),
        meta=meta,
    )


def pack(
    sentences: Sequence[str], size: int, tokenizer: PreTrainedTokenizerBase
) -> list[list[int]]:
    """Groups sentence indices into chunks of up to ``size`` tokens, or of one longer sentence."""
    distinct = list(dict.fromkeys(sentences))
    spaced = [f"{sentence} " for sentence in distinct]
    encodings = tokenizer(spaced, add_special_tokens=False, verbose=False)["input_ids"]
    tokens = dict(zip(distinct, map(len, encodings), strict=True))
    groups: list[list[int]] = []
    room = 0
    for index, sentence in enumerate(sentences):
        if not groups or tokens[sentence] > room:
            groups.append([])
            room = size
        groups[-1].append(index)
        room -= tokens[sentence]
    return groups


def largest(fits: Callable[[int], bool]) -> int | None:
    """Finds the largest size that fits, by doubling, then bisection. None if 1 does not."""
    if not fits(1):
        return None
    high = 8
    while fits(high):
        high *= 2
    return bisect_left(range(high), True, 1, key=lambda size: not fits(size)) - 1
