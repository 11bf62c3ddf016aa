"""Measures time to first token: one prompt at a time, warm caches, methods interleaved."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from blocktune.data import RagExample


class TtftSummary(NamedTuple):
    """Time to first token of one method over several prompts."""

    median: float  # seconds
    q25: float  # first quartile, seconds
    q75: float  # third quartile, seconds
    num: int  # number of prompts
    context_tokens: float  # median length of their contexts


def measure_ttft(
    methods: Mapping[str, Callable[[RagExample], Any]],
    examples: Sequence[RagExample],
    step: Callable[[], None] = lambda: None,
) -> dict[str, TtftSummary]:
    """Measures every method on every example, interleaved, so that machine drift affects all alike.

    Before an example is timed, every method answers it once with its chunks in another order. This
    is the typical case of reuse: all chunks are cached, but the prompt as a whole is not, so an
    exact prefix cache only finds its usual prefix. The order of methods rotates between prompts.

    Methods return the engine's `Answer` with one new token; ``step`` is called after each.
    """
    usages: dict[str, list[Any]] = {label: [] for label in methods}
    for turn, example in enumerate(examples):
        labels = np.roll(list(methods), -turn).tolist()
        warming = replace(example, chunks=example.chunks[1:] + example.chunks[:1], supporting=())
        for label in labels:
            methods[label](warming)
            step()
        for label in labels:
            usages[label].append(methods[label](example).usage)
            step()
    summaries = {}
    for label, own in usages.items():
        q25, middle, q75 = np.quantile([usage.ttft_s for usage in own], [0.25, 0.5, 0.75]).tolist()
        tokens = median(usage.context_tokens for usage in own)
        summaries[label] = TtftSummary(middle, q25, q75, len(own), tokens)
    return summaries


def fill(examples: Sequence[RagExample], num: int, chunks: int | None) -> list[RagExample]:
    """The first ``num`` examples, each filled to ``chunks`` chunks from the examples after it.

    Raises ValueError if all examples together have fewer chunks.
    """
    if chunks is None:
        return list(examples[:num])
    held = sum(len(example.chunks) for example in examples)
    if held < chunks:
        raise ValueError(
            f"ttft needs prompts of {chunks} chunks, the task holds only {held}; lower 'chunks' of "
            "ttft in the suite, or give the task more questions"
        )
    filled = []
    for index, example in enumerate(examples[:num]):
        following = (c for e in (*examples[index:], *examples[:index]) for c in e.chunks)
        filled.append(replace(example, chunks=tuple(islice(following, chunks)), supporting=()))
    return filled
