"""The model and prompt that are timed, and fair timing on a busy machine."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from blocktune.cache import ChunkStore
from blocktune.engine import Engine, Sampling, Usage
from blocktune.methods import Method, build
from blocktune.prompt import Pieces
from blocktune.testing import byte_tokenizer, random_llama

TARGETS = {"cacheblend_over_full": 0.35, "epic_over_full": 0.12, "naive_over_query_only": 1.8}
"""Goals of the project, on two cores with the default setting."""
PRODUCT, COPIED = 2048, 1 << 28
"""Rows of the square product and bytes of the copy that the machine's rates are measured on."""


@dataclass(frozen=True)
class ReuseBench:
    """A random Llama in float32, and a prompt of random tokens whose chunks are in memory.

    Attributes:
        tokens: Length of the prompt.
        chunk: Tokens per chunk; the last one takes what is left.
        question: Tokens of the question, which ends the prompt.
        ratio: Share that ``cacheblend`` recomputes.
        k: Tokens that ``epic`` recomputes at the start of each chunk.
        width: Hidden size.
        intermediate: Width of the feed-forward.
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
        """The timed methods; full prefill by the stock model and the question alone come on top."""
        return {
            "full": build("full-prefill"),
            "naive": build("naive"),
            "epic": build("epic", k=self.k),
            "cacheblend": build("cacheblend", ratio=self.ratio),
        }

    def engine(self, store: ChunkStore | None = None) -> Engine:
        """An engine over the model, with empty caches, or with ``store``."""
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
"""One core computes while another can load; so narrow that loading is a tenth of the time."""

TINY = ReuseBench(
    256, 64, 16, layers=2, width=64, intermediate=128, heads=4, kv_heads=2, threads=1, repeats=1
)
"""Small enough for a test; its ratios mean nothing."""


def usage_of(engine: Engine, pieces: Pieces, method: Method) -> Usage:
    """The usage of a method whose chunks are cached."""
    return engine.start([pieces], method).answers(Sampling(), 1, (0,))[0].usage


def take_turns(works: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Times works in turn, so that other load on the machine affects all of them alike.

    Args:
        works: What to time; a work may return its own seconds as a float.
        repeats: Timed rounds, after one untimed round to warm up.

    Returns:
        Seconds of every round, by name.
    """
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(repeats + 1):
        for name, work in works.items():
            gc.collect()
            gc.freeze()  # the next collection looks at new objects only
            start = time.perf_counter()
            own = work()
            seconds = own if isinstance(own, float) else time.perf_counter() - start
            if turn:
                times[name].append(seconds)
    gc.unfreeze()
    return times


def ratios(times: Mapping[str, list[float]], over: str, under: str) -> list[float]:
    """The ratio of the seconds of two works within each round."""
    return [a / b for a, b in zip(times[over], times[under], strict=True)]


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median": statistics.median(values), "least": min(values), "greatest": max(values)}


def matmul_rate(repeats: int = 5) -> float:
    """Floating-point operations per second of a square float32 product, the best of several."""
    left, right = torch.randn(PRODUCT, PRODUCT), torch.randn(PRODUCT, PRODUCT)
    return 2 * PRODUCT**3 / min(take_turns({"": lambda: left @ right}, repeats)[""])


def copy_rate(repeats: int = 5) -> float:
    """Bytes per second of copying one tensor into another, the best of several.

    A copied byte is read and written, and counts once.
    """
    source = torch.ones(COPIED, dtype=torch.uint8)
    target = torch.empty_like(source)
    return COPIED / min(take_turns({"": lambda: target.copy_(source)}, repeats)[""])


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Lets PyTorch use ``count`` threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
