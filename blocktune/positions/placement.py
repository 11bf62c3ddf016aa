"""Where chunks stand in a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

PLACEMENTS = ("sequential", "parallel", "composite", "reserved")


class Placement(NamedTuple):
    """First position of each piece."""

    chunks: tuple[int, ...]  # of each chunk (with the links that belong to it)
    query: int  # of the query


def place(
    placement: str, prefix_length: int, chunk_lengths: Sequence[int], slot: int = 0
) -> Placement:
    """Positions at which the pieces of a prompt start.

    Args:
        placement: ``sequential`` (one after the other, as in an ordinary prompt), ``parallel``
            (every chunk right after the prefix, the query after the longest; APE), ``composite``
            (every chunk where it was encoded, from 0, and the query where the cache ends;
            TurboRAG) or ``reserved`` (every chunk at the start of its slot, the query after the
            last slot; PromptCache).
        prefix_length: Tokens of the prefix.
        chunk_lengths: Tokens of each chunk, its links included.
        slot: Positions reserved for each chunk; only read by ``reserved``.

    Raises:
        ValueError: If the placement is unknown, or a chunk does not fit into its slot.

    Source: APE arXiv:2502.05431, TurboRAG arXiv:2410.07590, PromptCache arXiv:2311.04934.
    """
    total = prefix_length + sum(chunk_lengths)
    if placement == "sequential":
        ends = list(accumulate(chunk_lengths, initial=prefix_length))
        return Placement(tuple(ends[:-1]), total)
    if placement == "parallel":
        longest = max(chunk_lengths, default=0)
        return Placement((prefix_length,) * len(chunk_lengths), prefix_length + longest)
    if placement == "composite":
        return Placement((0,) * len(chunk_lengths), total)
    if placement == "reserved":
        longest = max(chunk_lengths, default=0)
        if longest > slot:
            raise ValueError(
                f"chunk {list(chunk_lengths).index(longest)} takes {longest} positions, the schema "
                f"reserves {slot} for each; cut chunks smaller or reserve more (slot)"
            )
        starts = tuple(prefix_length + index * slot for index in range(len(chunk_lengths)))
        return Placement(starts, prefix_length + slot * len(chunk_lengths))
    raise ValueError(f"unknown placement '{placement}'; available: {', '.join(PLACEMENTS)}")
