"""What an answer cost, counted where the work is done."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, fields
from typing import Any

import torch


@dataclass(frozen=True)
class Ttft:
    """Seconds from request to first token, split by what they were spent on.

    Prompts of one batch are served together: each carries the batch's times.

    Attributes:
        prompt_s: Tokenising and laying the prompt out.
        lookup_s: Finding out which chunks are cached.
        load_s: Reading, verifying and moving them.
        encode_s: Encoding the chunks that were not cached (0 when warm).
        relocate_s: Rotating keys to their positions and joining caches.
        select_s: Choosing tokens to recompute, with the passes and probes it takes.
        recompute_s: Computing them, the links and the question.
        first_token_s: Picking the first token.
    """

    prompt_s: float = 0.0
    lookup_s: float = 0.0
    load_s: float = 0.0
    encode_s: float = 0.0
    relocate_s: float = 0.0
    select_s: float = 0.0
    recompute_s: float = 0.0
    first_token_s: float = 0.0

    @property
    def total_s(self) -> float:
        """All of it."""
        return sum(getattr(self, f.name) for f in fields(self))


@dataclass(frozen=True)
class Usage:
    """The cost of one answer.

    Attributes:
        prompt_tokens: Tokens of prefix, chunks, links and question.
        context_tokens: Tokens of chunks.
        layer_tokens: Context tokens computed at answering time, per layer.
        probed_tokens: Context tokens for which only keys and values were made, at check layers.
        flops: Floating-point operations up to the first token: matrices and attention, passes
            for choosing tokens included, encoding of chunks that were not cached left out.
        bytes_read: Bytes of cached keys and values that were put into the prompt.
        bytes_moved: Bytes read from chunk caches and written into the prompt's, by loading and
            by computing.
        chunk_hits: Chunks found in the cache.
        chunk_misses: Chunks that had to be encoded first.
        answer_tokens: Tokens decoded.
        ttft: Times to the first token.
        query_entropy: Entropy of the question's attention in nats, mean over its rows, the heads
            and the layers that were reshaped; None if the method reshapes nothing.
        loading: What the method's `ChunkLoader` reports; None if it has none.
    """

    prompt_tokens: int
    context_tokens: int
    layer_tokens: tuple[int, ...]
    probed_tokens: int
    flops: int
    bytes_read: int
    bytes_moved: int
    chunk_hits: int
    chunk_misses: int
    answer_tokens: int
    ttft: Ttft
    query_entropy: float | None = None
    loading: Any = None

    @property
    def recompute_ratio(self) -> float:
        """Share of the context's layer-tokens that were computed, in [0, 1].

        All layers count alike, so CacheBlend's fully computed first layer is in it.
        """
        whole = self.context_tokens * len(self.layer_tokens)
        return sum(self.layer_tokens) / whole if whole else 0.0

    @property
    def ttft_s(self) -> float:
        """Seconds from request to first token."""
        return self.ttft.total_s


@dataclass
class Stopwatch:
    """Adds up seconds by name; on CUDA it waits for the kernels it is timing."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)
    _since: float = 0.0

    def start(self) -> None:
        """Begins the next span."""
        self._since = self._now()

    def stop(self, name: str) -> None:
        """Books the time since the last `start` or `stop` under ``name``."""
        now = self._now()
        self.add(name, now - self._since)
        self._since = now

    def add(self, name: str, seconds: float) -> None:
        """Books a time measured elsewhere."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
