"""Looks an answer up in a response cache, and stores a new one there."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from blocktune.cache.responses import ResponseCache
from blocktune.engine.generation import Answer, Sampling
from blocktune.engine.state import EngineState
from blocktune.engine.usage import Ttft, Usage
from blocktune.methods import Method
from blocktune.prompt import Pieces


@dataclass(frozen=True)
class Recall:
    """One prompt's entry in a response cache. ``place`` hashes all inputs but the question."""

    cache: ResponseCache
    state: EngineState
    pieces: Pieces
    question: str
    place: str

    @classmethod
    def of(
        cls,
        cache: ResponseCache | None,
        state: EngineState,
        method: Method,
        sampling: Sampling,
        settings: object,
        pieces: Pieces,
        question: str,
        stream: int = 0,
    ) -> Recall | None:
        """Returns None without a cache, or if answers are sampled without a seed."""
        if cache is None or (sampling.temperature > 0 and sampling.seed is None):
            return None
        draws = (sampling, stream) if sampling.temperature > 0 else "greedy"
        answering = method, draws, settings, sorted(state.stop_ids()), state.decode_cache
        place = repr((state.encoder.fingerprint, answering, pieces.prefix, pieces.chunks))
        return cls(cache, state, pieces, question, hashlib.sha256(place.encode()).hexdigest())

    def find(self) -> tuple[Mapping[str, Any], Usage] | None:
        """The cached record of the answer, and the usage of answering from it; None: a miss."""
        started = time.perf_counter()
        found = self.cache.find(self.place, self.pieces.query, self.question)
        if found is None:
            return None
        record, similarity = found
        usage = Usage(
            prompt_tokens=self.pieces.num_tokens,
            context_tokens=sum(map(len, self.pieces.chunks)),
            layer_tokens=(0,) * self.state.num_layers,
            answer_tokens=record["count"],
            ttft=Ttft(lookup_s=time.perf_counter() - started),
            recalled=similarity,
            **dict.fromkeys(("probed_tokens", "flops", "bytes_read", "bytes_moved"), 0),
            **dict.fromkeys(("chunk_hits", "chunk_misses"), 0),
        )
        return record, usage

    def answer(self) -> Answer | None:
        """The cached answer, or None."""
        if (found := self.find()) is None:
            return None
        return Answer(found[0]["text"], tuple(found[0]["ids"]), found[1])

    def keep(self, text: str, ids, seconds: float = 0.0, **facts: Any) -> None:
        """Stores an answer that took ``seconds``, with more ``facts`` as JSON values."""
        record = {"text": text, "ids": list(ids), "count": len(ids)} | facts
        about = {"seconds": seconds, "tenant": self.state.encoder.tenant}
        self.cache.keep(self.place, self.pieces.query, self.question, record, **about)
