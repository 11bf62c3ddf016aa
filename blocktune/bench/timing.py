"""Fair timing on a machine that does other things too: turns, medians, and what it can at best."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch

Work = Callable[[], object]
Times = Mapping[str, list[float]]
"""Seconds of each round, by what was timed."""


def take_turns(works: Mapping[str, Work], repeats: int) -> dict[str, list[float]]:
    """Times works in turn, so that what else the machine does meets all of them alike.

    Args:
        works: What to time; a work may return the seconds it took itself, as a float.
        repeats: Timed rounds, after one that is not timed: it warms memory and threads up.

    Returns:
        Seconds of every round, by name.
    """
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(repeats + 1):
        for name, work in works.items():
            gc.collect()
            start = time.perf_counter()
            own = work()
            seconds = own if isinstance(own, float) else time.perf_counter() - start
            if turn:
                times[name].append(seconds)
    return times


def ratios(times: Times, over: str, under: str) -> list[float]:
    """The ratio within each round."""
    return [a / b for a, b in zip(times[over], times[under], strict=True)]


def ratio(times: Times, over: str, under: str) -> float:
    """Median of the `ratios` within each round."""
    return statistics.median(ratios(times, over, under))


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median": statistics.median(values), "least": min(values), "greatest": max(values)}


def matmul_rate(size: int = 2048, repeats: int = 5) -> float:
    """Floating-point operations per second of a square float32 product, the best of some."""
    left, right = torch.randn(size, size), torch.randn(size, size)
    return 2 * size**3 / _best(lambda: left @ right, repeats)


def copy_rate(num_bytes: int = 1 << 28, repeats: int = 5) -> float:
    """Bytes per second of copying one tensor into another, the best of some.

    A byte that is copied is read and written once; it counts once.
    """
    source = torch.ones(num_bytes, dtype=torch.uint8)
    target = torch.empty_like(source)
    return num_bytes / _best(lambda: target.copy_(source), repeats)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Lets PyTorch use ``count`` threads for the time of the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _best(work: Work, repeats: int) -> float:
    return min(min(seconds) for seconds in take_turns({"": work}, repeats).values())
