"""Where chunks stand in a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

PLACEMENTS = ("sequential", "parallel", "composite")


class Placement(NamedTuple):
    """First position of each piece.

    Attributes:
        chunks: Of each chunk (with the links that belong to it).
        query: Of the query.
    """

    chunks: tuple[int, ...]
    query: int


def place(placement: str, prefix_length: int, chunk_lengths: Sequence[int]) -> Placement:
    """Positions at which the pieces of a prompt start.

    Args:
        placement: ``sequential`` (one after the other, as in an ordinary prompt), ``parallel``
            (every chunk right after the prefix, the query after the longest; APE) or
            ``composite`` (every chunk where it was encoded, from 0, and the query where the
            cache ends; TurboRAG).
        prefix_length: Tokens of the prefix.
        chunk_lengths: Tokens of each chunk, its links included.

    Raises:
        ValueError: If the placement is unknown.

    Source: APE arXiv:2502.05431 (parallel), TurboRAG arXiv:2410.07590 (composite).
    """
    total = prefix_length + sum(chunk_lengths)
    if placement == "sequential":
        ends = torch.tensor([prefix_length, *chunk_lengths]).cumsum(0).tolist()
        return Placement(tuple(ends[:-1]), total)
    if placement == "parallel":
        longest = max(chunk_lengths, default=0)
        return Placement((prefix_length,) * len(chunk_lengths), prefix_length + longest)
    if placement == "composite":
        return Placement((0,) * len(chunk_lengths), total)
    raise ValueError(f"unknown placement '{placement}'; available: {', '.join(PLACEMENTS)}")
