"""How much context fits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from transformers import PreTrainedTokenizerBase

from blocktune.prompt import Chunk, PromptFormat, make_pieces


def count_tokens(
    tokenizer: PreTrainedTokenizerBase, fmt: PromptFormat, chunks: Sequence[Chunk], question: str
) -> int:
    """Tokens of the prompt as the model gets it, piece by piece."""
    pieces = make_pieces(tokenizer, fmt, chunks, question)
    return sum(map(len, (pieces.prefix, *pieces.chunks, pieces.query)))


def largest(fits: Callable[[int], bool], least: int) -> int | None:
    """The largest size that fits, found by doubling and halving; None if ``least`` does not.

    A size that cannot be made (``fits`` raises ValueError) does not fit, unless it is the least.
    """
    if not fits(least):
        return None

    def good(size: int) -> bool:
        try:
            return fits(size)
        except ValueError:
            return False

    low, high = least, max(2 * least, 8)
    while good(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if good(middle) else (low, middle)
    return low


def shrunk(size: int, least: int) -> Iterator[int]:
    """The size, then ever smaller ones, down to the least."""
    while size > least:
        yield size
        size -= max(1, size // 50)
    yield least
