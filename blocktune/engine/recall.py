"""An answer that comes from a response cache, or goes into it."""

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
    """One prompt's view of a response cache; ``place`` is what decides its answer elsewhere."""

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
        decoding: tuple[Sampling, object],
        asked: tuple[int, Pieces, str],
    ) -> Recall | None:
        """None without a cache, or where answers are drawn without a seed.

        ``decoding`` is the sampling and all other settings, ``asked`` the stream of random numbers,
        the prompt, and the question's text. A salted state has a fingerprint of its own.
        """
        (sampling, settings), (stream, pieces, question) = decoding, asked
        if cache is None or (sampling.temperature > 0 and sampling.seed is None):
            return None
        drawn = (sampling, stream) if sampling.temperature > 0 else "greedy"
        answering = method, drawn, settings, sorted(state.stop_ids()), state.decode_cache
        place = repr((state.encoder.fingerprint, answering, pieces.prefix, pieces.chunks))
        return cls(cache, state, pieces, question, hashlib.sha256(place.encode()).hexdigest())

    def find(self) -> tuple[Mapping[str, Any], Usage] | None:
        """What was kept, and the usage of an answer from it."""
        started = time.perf_counter()
        found = self.cache.find(self.place, self.pieces.query, self.question)
        if found is None:
            return None
        usage = Usage(
            prompt_tokens=self.pieces.num_tokens,
            context_tokens=sum(map(len, self.pieces.chunks)),
            layer_tokens=(0,) * self.state.num_layers,
            answer_tokens=found[0]["count"],
            ttft=Ttft(lookup_s=time.perf_counter() - started),
            recalled=found[1],
            **dict.fromkeys(("probed_tokens", "flops", "bytes_read", "bytes_moved"), 0),
            **dict.fromkeys(("chunk_hits", "chunk_misses"), 0),
        )
        return found[0], usage

    def answer(self) -> Answer | None:
        """What `keep` was given, as an answer."""
        if (found := self.find()) is None:
            return None
        return Answer(found[0]["text"], tuple(found[0]["ids"]), found[1])

    def keep(self, text: str, ids, seconds: float = 0.0, **facts: Any) -> None:
        """Keeps an answer, which took ``seconds``; ``facts`` are plain JSON."""
        kept = {"text": text, "ids": list(ids), "count": len(ids)} | facts
        about = {"seconds": seconds, "tenant": self.state.encoder.tenant}
        self.cache.keep(self.place, self.pieces.query, self.question, kept, **about)
