"""Cleans an engine's caches, so that no measurement depends on what others left in them."""

from __future__ import annotations

from collections.abc import Sequence

from blocktune.data import RagExample
from blocktune.engine.encode import wanted_pieces
from blocktune.engine.engine import Engine
from blocktune.engine.usage import Stopwatch
from blocktune.methods import Cached, Method


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
