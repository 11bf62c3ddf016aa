"""Answers of a call that come from a response cache, and go into it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from blocktune.cache.responses import ResponseCache, scope_of
from blocktune.engine.generation import Answer, Sampling
from blocktune.engine.state import EngineState
from blocktune.engine.usage import Ttft, Usage
from blocktune.methods import Method
from blocktune.prompt import Pieces


@dataclass(frozen=True)
class Recall:
    """One call's view of a response cache.

    Attributes:
        cache: The answers.
        state: Whose answers; a tenant's state has a fingerprint of its own.
        decides: What else decides an answer: method, settings, limits.
        is_drawn: Whether the place of a prompt in the call does, too.
    """

    cache: ResponseCache
    state: EngineState
    decides: tuple
    is_drawn: bool

    @classmethod
    def of(
        cls,
        cache: ResponseCache | None,
        state: EngineState,
        method: Method,
        sampling: Sampling,
        *limits: object,
    ) -> Recall | None:
        """None without a cache, or where answers are drawn without a seed."""
        is_drawn = sampling.temperature > 0
        if cache is None or (is_drawn and sampling.seed is None):
            return None
        settings = sampling if is_drawn else "greedy"
        decides = method, settings, sorted(state.stop_ids()), state.decode_cache, limits
        return cls(cache, state, decides, is_drawn)

    def find(
        self, stream: int, pieces: Pieces, question: str
    ) -> tuple[Mapping[str, Any], Usage] | None:
        """What was kept of prompt number ``stream``, and the usage of an answer from it."""
        started = time.perf_counter()
        scope = self._scope(stream, pieces)
        found = self.cache.find(scope, pieces.context, pieces.query, question)
        if found is None:
            return None
        usage = Usage(
            prompt_tokens=pieces.num_tokens,
            context_tokens=sum(map(len, pieces.chunks)),
            layer_tokens=(0,) * self.state.num_layers,
            probed_tokens=0,
            flops=0,
            bytes_read=found.num_bytes,
            bytes_moved=found.num_bytes,
            chunk_hits=0,
            chunk_misses=0,
            answer_tokens=found.facts["count"],
            ttft=Ttft(lookup_s=time.perf_counter() - started),
            recalled=found.similarity,
        )
        return found.facts, usage

    def keep(
        self,
        stream: int,
        pieces: Pieces,
        question: str,
        facts: Mapping[str, Any],
        seconds: float = 0.0,
    ) -> None:
        """Keeps an answer: its ``count`` of tokens and other plain JSON, and how long it took."""
        about = {"seconds": seconds, "tenant": self.state.encoder.tenant}
        scope = self._scope(stream, pieces)
        self.cache.keep(scope, pieces.context, pieces.query, question, facts, **about)

    def answer(self, stream: int, pieces: Pieces, question: str) -> Answer | None:
        """The answer that `keep_answer` kept."""
        if (known := self.find(stream, pieces, question)) is None:
            return None
        return Answer(known[0]["text"], tuple(known[0]["ids"]), known[1])

    def keep_answer(
        self, stream: int, pieces: Pieces, question: str, text: str, ids, seconds: float = 0.0
    ) -> None:
        """Keeps an answer's text and token ids."""
        facts = {"text": text, "ids": list(ids), "count": len(ids)}
        self.keep(stream, pieces, question, facts, seconds)

    def _scope(self, stream: int, pieces: Pieces) -> str:
        sizes = tuple(map(len, (pieces.prefix, *pieces.chunks)))
        place = stream if self.is_drawn else 0
        return scope_of(self.state.encoder.fingerprint, self.decides, sizes, place)
