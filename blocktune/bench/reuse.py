"""Benchmark of reuse methods' prefill, and helpers for fair timing on a busy machine."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from transformers import LlamaForCausalLM

from blocktune.attention import planned_forward
from blocktune.attention.cached import CachePlan
from blocktune.cache import ChunkStore
from blocktune.engine import Engine, Sampling, Usage
from blocktune.engine.generation import Generation
from blocktune.engine.rows import computed_rows
from blocktune.layout import Kind
from blocktune.methods import Method, build
from blocktune.prompt import Pieces
from blocktune.provenance import provenance
from blocktune.testing import byte_tokenizer, random_llama

RATIOS = ("cacheblend_over_full", "epic_over_full", "naive_over_query_only")
WARM_S = 3.0  # work that takes longer needs no warm-up round
PRODUCT = 2048  # rows of the square matrices whose product is timed
COPIED = 1 << 28  # bytes whose copying is timed


@dataclass(frozen=True)
class ReuseBench:
    """Setting: a random Llama in float32, and a prompt of random tokens with chunks in memory."""

    tokens: int = 8192  # tokens of the prompt
    chunk: int = 512  # tokens per chunk; the last chunk may be shorter
    question: int = 64  # tokens of the question, at the end of the prompt
    ratio: float = 0.15  # share of tokens that ``cacheblend`` recomputes
    k: int = 16  # tokens that ``epic`` recomputes at the start of each chunk
    layers: int = 12
    width: int = 768  # hidden size
    intermediate: int = 2048  # width of the feed-forward
    heads: int = 12
    kv_heads: int = 4
    threads: int = 2  # threads of PyTorch
    repeats: int = 5  # timed rounds, after an untimed one
    seed: int = 0  # of weights and tokens

    def __post_init__(self):
        if self.chunk < 1 or self.question < 1 or self.tokens - self.question <= self.chunk:
            wanted = f"two chunks of {self.chunk} and a question of {self.question}"
            raise ValueError(f"the benchmark needs {wanted}, got {self.tokens} tokens; give more")

    def engine(self, store: ChunkStore | None = None) -> Engine:
        """An engine over the model, with empty caches or a ``store``."""
        return Engine(*random_model(self, self.intermediate, self.tokens + 1), store=store)

    def pieces(self, vocab_size: int) -> Pieces:
        """The random prompt of this setting."""
        return random_pieces(vocab_size, self.tokens, self.chunk, self.question, self.seed)


def random_model(setting: Any, intermediate: int, length: int) -> tuple[LlamaForCausalLM, Any]:
    """The random model of a setting, with room for ``length`` tokens, and its tokenizer."""
    tokenizer = byte_tokenizer()
    sizes = {"hidden_size": setting.width, "intermediate_size": intermediate}
    sizes |= {"num_hidden_layers": setting.layers, "max_position_embeddings": length}
    heads = {"num_attention_heads": setting.heads, "num_key_value_heads": setting.kv_heads}
    return random_llama(len(tokenizer), seed=setting.seed, **sizes, **heads), tokenizer


SMALL = {"layers": 2, "width": 64, "intermediate": 128, "heads": 4, "kv_heads": 2}
TINY = ReuseBench(256, 64, 16, **SMALL, threads=1, repeats=1)  # its ratios are meaningless


def random_pieces(vocab_size: int, tokens: int, chunk: int, question: int, seed: int) -> Pieces:
    """Random chunks and a random question without a prefix, ``tokens`` in total."""
    draw = torch.Generator().manual_seed(seed)
    ids = tuple(torch.randint(vocab_size, (tokens,), generator=draw).tolist())
    context = ids[:-question]
    chunks = tuple(context[start : start + chunk] for start in range(0, len(context), chunk))
    return Pieces((), chunks, ids[-question:])


def usage_of(engine: Engine, pieces: Pieces, method: Method) -> Usage:
    """Usage of a method on a prompt whose chunks are cached."""
    return engine.start([pieces], method).answers(Sampling(), 1, (0,))[0].usage


def take_turns(works: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Times functions in turn, so that other load on the machine affects all alike.

    Returns seconds per round, by name, with what a function leaves to an accelerator. The first
    round does not count, unless it takes longer than `WARM_S`.
    """

    def now() -> float:
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        return time.perf_counter()

    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(repeats + 1):
        for name, work in works.items():
            if len(times[name]) == repeats:
                continue
            gc.collect()
            gc.freeze()  # the next collection looks at new objects only
            start = now()
            work()
            seconds = now() - start
            if turn or seconds > WARM_S:
                times[name].append(seconds)
    gc.unfreeze()
    return times


def ratios(times: Mapping[str, list[float]], over: str, under: str) -> list[float]:
    """Ratio of two timings in each round: ``over`` divided by ``under``."""
    return [a / b for a, b in zip(times[over], times[under], strict=True)]


def spread(values: list[float]) -> dict[str, float]:
    """Median, minimum (``least``) and maximum (``greatest``)."""
    return {"median": statistics.median(values), "least": min(values), "greatest": max(values)}


def rates(repeats: int) -> tuple[float, float]:
    """Bytes copied and FLOPs of a float32 matrix product per second, the best of several runs."""
    left, right = torch.randn(PRODUCT, PRODUCT), torch.randn(PRODUCT, PRODUCT)
    source, target = torch.ones(2, COPIED, dtype=torch.uint8)
    works = {"copy": lambda: target.copy_(source), "product": lambda: left @ right}
    times = take_turns(works, repeats)
    return COPIED / min(times["copy"]), 2 * PRODUCT**3 / min(times["product"])


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Context manager in which PyTorch uses ``count`` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def bench_reuse(bench: ReuseBench) -> dict[str, Any]:
    """Times prefills by several methods in turn, over chunks that are already in memory.

    A method's time covers all from token ids to the logits after the question. For ``full`` see
    `time_methods`; ``query_only`` computes the question over an assembled cache. Ratios are medians
    of the ratios in each round. ``cost`` is of each method, also at the machine's rates.
    """
    with threads(bench.threads), torch.no_grad():
        engine = bench.engine()
        methods = {"naive": build("naive"), "epic": build("epic", k=bench.k)}
        methods["cacheblend"] = build("cacheblend", ratio=bench.ratio)
        pieces = bench.pieces(len(engine.tokenizer))
        alone = query_only(engine.model, engine.start([pieces], methods["naive"]))
        times = time_methods(engine, pieces, methods, bench.repeats, query_only=alone)
        methods["full"] = build("full-prefill")
        usages = {name: usage_of(engine, pieces, method) for name, method in methods.items()}
        copy, matmul = rates(bench.repeats)
    over = {name: spread(ratios(times, *name.split("_over_"))) for name in RATIOS}
    costs = {}
    for name, usage in usages.items():
        counts = ("recompute_ratio", "bytes_read", "bytes_moved", "flops")
        costs[name] = {count: getattr(usage, count) for count in counts}
        costs[name]["bytes_over_copy_rate_s"] = usage.bytes_moved / 2 / copy  # read and written
        costs[name]["flops_over_matmul_rate_s"] = usage.flops / matmul
    return {
        **{name: values["median"] for name, values in over.items()},
        "spread": over,
        "seconds": {name: spread(values) for name, values in times.items()},
        **{"bytes_per_s_copied": copy, "flops_per_s_matmul": matmul, "cost": costs},
        "setting": {**asdict(bench), "dtype": "float32"},
        **provenance(bench.seed),
    }


def time_methods(
    engine: Engine, pieces: Pieces, methods: Mapping[str, Method], repeats: int, **more: Callable
) -> dict[str, list[float]]:
    """Times the prefill of each method, the functions ``more``, and full prefill, in turn.

    ``full`` is the faster of ``full_engine`` (this engine) and ``full_stock`` (the stock model) in
    each round. Returns seconds of each round, by name.
    """
    ids = torch.tensor([sum(pieces.chunks, ()) + pieces.query], device=engine.model.device)
    stock = partial(engine.model, ids, use_cache=True, logits_to_keep=1)
    works = {"full_engine": build("full-prefill"), **methods}
    works = {name: partial(engine.start, [pieces], method) for name, method in works.items()}
    times = take_turns({"full_stock": stock} | works | more, repeats)
    return times | {"full": list(map(min, times["full_engine"], times["full_stock"]))}


def query_only(model: torch.nn.Module, run: Generation) -> Callable[[], object]:
    """Returns a function that recomputes the question over a run's cache, in the same columns."""
    rows = computed_rows(run.batch, run.batch.layout.kind == Kind.QUERY)

    def work() -> object:
        run.cache.select(rows.columns)
        placed = rows.rows.position, CachePlan(rows.rows, run.columns)
        return planned_forward(model, rows.ids, *placed, run.cache, logits_to_keep=1)

    return work
