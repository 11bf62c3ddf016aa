"""Time to first token: one prompt at a time, caches warm, all methods in turn on each prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from blocktune.data import RagExample


class TtftSummary(NamedTuple):
    """Seconds from request to first token over ``num`` prompts: median and quartiles."""

    median: float
    q25: float
    q75: float
    num: int


Ask = Callable[[RagExample], Any]
"""Answers one example with one new token and returns the engine's `Answer`."""


def measure_ttft(
    methods: Mapping[str, Ask],
    examples: Sequence[RagExample],
    step: Callable[[], None] = lambda: None,
) -> dict[str, TtftSummary]:
    """Measures every method on every example, interleaved, so that drift of the machine is shared.

    Before an example is measured, every method answers it once with its chunks in another order.
    That is reuse as it is met: each chunk is cached, the prompt as a whole is not, so an exact
    prefix cache finds what prompts really share. The order of methods turns from prompt to prompt.

    Args:
        methods: Label -> how to ask.
        examples: At least one prompt.
        step: Called after every answer, for a progress bar.
    """
    seconds: dict[str, list[float]] = {label: [] for label in methods}
    for turn, example in enumerate(examples):
        labels = np.roll(list(methods), -turn).tolist()
        warming = replace(example, chunks=example.chunks[1:] + example.chunks[:1], supporting=())
        for label in labels:
            methods[label](warming)
            step()
        for label in labels:
            seconds[label].append(methods[label](example).account.ttft_s)
            step()
    return {label: summarise(values) for label, values in seconds.items()}


def summarise(seconds: Sequence[float]) -> TtftSummary:
    """Median and quartiles of at least one time."""
    q25, median, q75 = np.quantile(seconds, [0.25, 0.5, 0.75]).tolist()
    return TtftSummary(median, q25, q75, len(seconds))
