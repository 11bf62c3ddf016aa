"""Measures time to first token: one prompt at a time, with clean caches, methods in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import product
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from blocktune.data import RagExample
from blocktune.engine.encode import wanted_pieces
from blocktune.engine.engine import Engine
from blocktune.engine.usage import Stopwatch
from blocktune.evaluation.prepare import Ready
from blocktune.methods import Cached, Method
from blocktune.prompt import Chunk


class CleanCaches:
    """Encodes the chunks of a batch once for all methods that reuse the same chunks.

    Nothing may depend on what earlier questions or methods left in the caches. So they are emptied,
    unless they hold exactly the chunks that the method would encode.
    """

    _held: tuple | None = None  # what the caches hold, if that is known

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


def measure_ttft(ready: Ready, track: Callable[..., Iterable]) -> dict[str, TtftSummary]:
    """Measures every method on every example, in turn, so that machine drift affects all alike.

    Before each, the method answers, untimed from clean caches, the same chunks in another order; if
    the first would stay the first, after one more. This is the typical case of reuse: all chunks
    are cached, but the prompt as a whole is not, so an exact prefix cache only finds its usual
    prefix. The order of methods rotates. ``track`` is `rich.progress.Progress.track`.
    """
    caches, specs = CleanCaches(), ready.suite.methods
    usages: dict[str, list[Any]] = {spec.label: [] for spec in specs}
    turns = list(product(enumerate(ready.timed), range(len(specs))))
    for (turn, example), step in track(turns, description="time to first token"):
        chunks = example.chunks[1:] + example.chunks[:1]
        if chunks[:1] == example.chunks[:1]:
            chunks = (Chunk("Another passage."), *chunks)
        earlier = replace(example, chunks=chunks, supporting=())
        spec = specs[(turn + step) % len(specs)]
        engine, method = ready.engine(spec, ready.suite.tasks[0]), ready.methods[spec.label]
        caches.prepare(engine, method, [example])
        for asked in (earlier, example):
            [answer] = engine.answer([asked], method, max_new_tokens=1, batch_size=1)
        usages[spec.label].append(answer.usage)
    summaries = {}
    for label, own in usages.items():
        q25, middle, q75 = np.quantile([usage.ttft_s for usage in own], [0.25, 0.5, 0.75]).tolist()
        tokens = median(usage.context_tokens for usage in own)
        summaries[label] = TtftSummary(middle, q25, q75, len(own), tokens)
    return summaries
