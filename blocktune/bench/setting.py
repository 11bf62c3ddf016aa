"""What `blocktune bench reuse` is run on, and the ratios that it is held to."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from blocktune.cache import ChunkStore
from blocktune.engine import Engine
from blocktune.prompt import Pieces
from blocktune.reuse import Method, build
from blocktune.specimen import byte_tokenizer, random_llama

TARGETS = {"cacheblend_over_full": 0.35, "epic_over_full": 0.12, "naive_over_query_only": 1.8}
"""Ratios that the project set itself, on two cores with the default setting."""


@dataclass(frozen=True)
class ReuseBench:
    """A random Llama in float32 and a prompt of random tokens whose chunks lie in memory.

    Attributes:
        tokens: Length of the prompt.
        chunk: Tokens per chunk; the last one takes what is left.
        question: Tokens of the question, which ends the prompt.
        ratio: Share that ``cacheblend`` computes afresh.
        k: Tokens that ``epic`` computes at the start of each chunk.
        layers: Decoder layers.
        width: Hidden size.
        intermediate: Of the feed-forward.
        heads: Query heads.
        kv_heads: Key-value heads.
        threads: Threads that PyTorch may use.
        repeats: Timed rounds, after one that is not timed.
        seed: Of weights and tokens.

    Raises:
        ValueError: If the prompt has no room for two chunks and the question.
    """

    tokens: int = 8192
    chunk: int = 512
    question: int = 64
    ratio: float = 0.15
    k: int = 16
    layers: int = 12
    width: int = 768
    intermediate: int = 2048
    heads: int = 12
    kv_heads: int = 4
    threads: int = 2
    repeats: int = 5
    seed: int = 0

    def __post_init__(self):
        if self.chunk < 1 or self.question < 1 or self.tokens - self.question <= self.chunk:
            raise ValueError(
                f"the benchmark needs two chunks and a question; {self.tokens} tokens hold no two "
                f"chunks of {self.chunk} and a question of {self.question}: give more tokens"
            )

    def methods(self) -> dict[str, Method]:
        """What is timed, besides a full prefill by the stock model and the question alone."""
        return {
            "full": build("full-prefill"),
            "naive": build("naive"),
            "epic": build("epic", k=self.k),
            "cacheblend": build("cacheblend", ratio=self.ratio),
        }

    def engine(self, store: ChunkStore | None = None) -> Engine:
        """The model, behind an engine with empty caches; chunks go to ``store`` if one is given."""
        tokenizer = byte_tokenizer()
        model = random_llama(
            len(tokenizer),
            seed=self.seed,
            hidden_size=self.width,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=self.tokens + 1,
        )
        return Engine(model, tokenizer, store=store)

    def pieces(self, vocab_size: int) -> Pieces:
        """Random chunks and a random question, no prefix."""
        draw = torch.Generator().manual_seed(self.seed)
        ids = tuple(torch.randint(vocab_size, (self.tokens,), generator=draw).tolist())
        context = ids[: -self.question]
        starts = range(0, len(context), self.chunk)
        chunks = tuple(context[start : start + self.chunk] for start in starts)
        return Pieces((), chunks, ids[-self.question :])


LOADING = ReuseBench(width=256, intermediate=512, heads=4, kv_heads=4, threads=1)
"""One core computes, another can load; so narrow that loading is a tenth of the whole."""

TINY = ReuseBench(
    tokens=256,
    chunk=64,
    question=16,
    layers=2,
    width=64,
    intermediate=128,
    heads=4,
    kv_heads=2,
    repeats=1,
)
"""Small enough for a test; its ratios say nothing."""
