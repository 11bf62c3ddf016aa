"""Measures time to first token: one prompt at a time, with cached chunks, methods in turn.

Before any measurement, caches are cleaned of what others left in them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from blocktune.data import RagExample
from blocktune.engine.encode import wanted_pieces
from blocktune.engine.engine import Engine
from blocktune.engine.usage import Stopwatch
from blocktune.methods import Cached, Method
from blocktune.prompt import Chunk


class CleanCaches:
    """Encodes the chunks of a batch once for all methods that reuse the same chunks.

    No answer, time or fidelity may depend on what earlier questions or methods left in the caches.
    So the caches are emptied, unless they hold exactly the chunks that the method would encode.
    """

    def __init__(self):
        self._held: tuple | None = None

    def prepare(self, engine: Engine, method: Method, examples: Sequence[RagExample]) -> None:
        """Stores the chunks that the method reuses, or empties the engine's caches."""
        encoder, store = engine.state.encoder, engine.store
        makes_own = method.history or method.loader(store, engine.fingerprint)
        if method.cached is Cached.NOTHING and not makes_own:
            return
        if method.cached is not Cached.CHUNKS or makes_own:
            engine.forget()
            self._held = None
            return
        prompts = [engine.lay_out(engine.prompts.pieces(e, method), method) for e in examples]
        prompts.sort(key=lambda prompt: len(prompt.input_ids))  # as `Engine.answer` does
        pieces = [piece for prompt in prompts for piece in wanted_pieces(prompt)]
        layers = engine.state.inputs_of(method)
        wanted = store, engine.fingerprint, pieces, layers
        if self._held != wanted:
            engine.forget()
            encoder.find(pieces, Stopwatch(engine.model.device), layers)
            self._held = wanted
        if any(encoder.key(piece) not in store for piece in pieces):  # the store evicted some
            engine.forget()
            self._held = None


class TtftSummary(NamedTuple):
    """Time to first token of one method over several prompts."""

    median: float  # seconds
    q25: float  # first quartile, seconds
    q75: float  # third quartile, seconds
    num: int  # number of prompts
    context_tokens: float  # median length of their contexts


def measure_ttft(
    methods: Mapping[str, Callable[[RagExample, RagExample], Any]], examples: Iterable[RagExample]
) -> dict[str, TtftSummary]:
    """Measures every method on every example, in turn, so that machine drift affects all alike.

    A method gets an earlier prompt, which it answers untimed from clean caches, and the example.
    The earlier one has the same chunks in another order; if the first would stay the first, after
    one more. This is the typical case of reuse: all chunks are cached, but the prompt as a whole is
    not, so an exact prefix cache only finds its usual prefix. The order of methods rotates.

    Methods return the engine's `Answer` to the example with one new token.
    """
    usages: dict[str, list[Any]] = {label: [] for label in methods}
    for turn, example in enumerate(examples):
        chunks = example.chunks[1:] + example.chunks[:1]
        if chunks[:1] == example.chunks[:1]:
            chunks = (Chunk("Another passage."), *chunks)
        earlier = replace(example, chunks=chunks, supporting=())
        for label in np.roll(list(methods), -turn).tolist():
            usages[label].append(methods[label](earlier, example).usage)
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
    if (held := sum(len(example.chunks) for example in examples)) < chunks:
        wanted = f"ttft needs prompts of {chunks} chunks, the task holds only {held}"
        raise ValueError(f"{wanted}; lower 'chunks' of ttft, or give the task more questions")
    filled = []
    for index, example in enumerate(examples[:num]):
        following = (c for e in (*examples[index:], *examples[:index]) for c in e.chunks)
        filled.append(replace(example, chunks=tuple(islice(following, chunks)), supporting=()))
    return filled
