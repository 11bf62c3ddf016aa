"""Positions of the chunks in a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

PLACEMENTS = ("sequential", "parallel", "composite", "reserved")


def place(
    placement: str, prefix_length: int, chunk_lengths: Sequence[int], slot: int = 0
) -> tuple[tuple[int, ...], int]:
    """Positions at which chunks (including links) and query start, by one of `PLACEMENTS`.

    ``sequential``: chunks follow each other. ``parallel``: all chunks start after the prefix, the
    query after the longest. ``composite``: chunks stay at 0, where they were encoded; the query
    starts at the number of tokens before it. ``reserved``: each chunk starts a slot of ``slot``
    positions; the query comes after the last. Raises ValueError if a chunk does not fit into its
    slot.

    Source: APE arXiv:2502.05431 (parallel), TurboRAG arXiv:2410.07590 (composite), PromptCache
    arXiv:2311.04934 (reserved).
    """
    total, longest = prefix_length + sum(chunk_lengths), max(chunk_lengths, default=0)
    if placement == "sequential":
        *starts, _ = accumulate(chunk_lengths, initial=prefix_length)
        return tuple(starts), total
    if placement == "parallel":
        return (prefix_length,) * len(chunk_lengths), prefix_length + longest
    if placement == "composite":
        return (0,) * len(chunk_lengths), total
    if longest > slot:
        raise ValueError(
            f"chunk {list(chunk_lengths).index(longest)} takes {longest} positions, the schema "
            f"reserves {slot} for each; cut chunks smaller or reserve more (slot)"
        )
    starts = tuple(prefix_length + index * slot for index in range(len(chunk_lengths)))
    return starts, prefix_length + slot * len(chunk_lengths)
