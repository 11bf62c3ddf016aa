"""Where to keep the states of a recurrent model along a prompt.

Keys and values can be cut at any token; a recurrent state cannot: what a later prompt shares up to
depth ``d`` is computed again from the deepest checkpoint at or before ``d``. Which ``M`` depths to
keep is decided by the depths up to which earlier prompts were shared.

Source: sparse prefix caching, arXiv:2605.05219, a dynamic programme of O(N M) steps.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from itertools import accumulate


def place_checkpoints(weights: Mapping[int, int], budget: int) -> tuple[int, ...]:
    """The depths, at most ``budget``, from which the fewest tokens are computed again.

    Only depths that occur are candidates: a checkpoint between two of them is never better than at
    the next one. With the last checkpoint at depth ``i``, the cost up to depth ``j`` is a line in
    the number of prompts before ``j`` whose slope is ``-i``; both only grow, so that the lowest
    line of each ``j`` is found in constant time on average.

    Args:
        weights: How often prompts were shared up to each depth (in tokens).
        budget: Checkpoints to place.

    Returns:
        Rising depths. Deterministic: of equal placements, one.
    """
    depths = sorted(depth for depth, weight in weights.items() if depth > 0 and weight > 0)
    count = len(depths)
    if budget >= count or budget < 1:
        return tuple(depths[: max(budget, 0)])
    before = [0, *accumulate(weights[depth] for depth in depths)]
    tokens = [0, *accumulate(weights[depth] * depth for depth in depths)]
    cost, last = tokens, []  # cost[j] of the first j depths, without any checkpoint
    for _ in range(budget):
        cost, chosen = _one_more(cost, depths, before, tokens)
        last.append(chosen)
    placed, j = [], count
    for chosen in reversed(last):
        j = chosen[j]
        if j is None:
            break
        placed.append(depths[j])
    return tuple(reversed(placed))


def _one_more(cost: list, depths: list, before: list, tokens: list) -> tuple[list, list]:
    """Costs with one checkpoint more, and at which depth's index it is the last (None: nowhere)."""
    lines: deque[tuple[int, int, int]] = deque()  # slope, intercept, index; falling slopes
    made, chosen = [0], [None]
    for j in range(1, len(before)):
        i = j - 1
        slope = -depths[i]
        line = (slope, cost[i] - tokens[i] - slope * before[i], i)
        while len(lines) > 1 and _hidden(lines[-2], lines[-1], line):
            lines.pop()
        lines.append(line)
        x = before[j]
        while len(lines) > 1 and lines[1][0] * x + lines[1][1] <= lines[0][0] * x + lines[0][1]:
            lines.popleft()
        slope, intercept, index = lines[0]
        made.append(tokens[j] + slope * x + intercept)
        chosen.append(index)
    return made, chosen


def _hidden(first: tuple, middle: tuple, last: tuple) -> bool:
    """Whether the middle one of three lines of falling slope is nowhere the lowest."""
    return (last[1] - first[1]) * (first[0] - middle[0]) <= (middle[1] - first[1]) * (
        first[0] - last[0]
    )


def recomputed_tokens(weights: Mapping[int, int], checkpoints: Iterable[int]) -> float:
    """Mean tokens between the deepest checkpoint that serves a prompt and its shared depth."""
    placed = sorted({0, *checkpoints})
    total = 0
    for depth, weight in weights.items():
        total += weight * (depth - max(point for point in placed if point <= depth))
    return total / sum(weights.values())
