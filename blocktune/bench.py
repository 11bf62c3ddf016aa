"""Speed of split attention on this machine, against what it replaces."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from blocktune.attention import SplitPlan, dense_mask
from blocktune.attention.kernels import Knobs
from blocktune.evaluation.provenance import hardware, versions
from blocktune.layout import FOREVER, GLOBAL, NO_CHUNK, NO_ROW, Kind, LayerRule, Layout

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def bench_attention(
    tokens: int = 8192,
    chunk: int = 512,
    *,
    heads: int = 8,
    kv_heads: int = 8,
    head_dim: int = 64,
    threads: int = 2,
    repeats: int = 5,
    seed: int = 0,
) -> dict[str, Any]:
    """Times one layer of attention, forward and backward, on the CPU.

    Split attention, SDPA over everything before (``full``) and SDPA with the same visibility as
    a dense mask take turns, so that what else the machine does meets all three alike; masks and
    plans are made beforehand, as they are once per batch for all layers.

    Args:
        tokens: Rows of the prompt.
        chunk: Tokens per chunk; the last ``chunk`` tokens are the query, which sees everything.
        heads: Query heads.
        kv_heads: Key-value heads.
        head_dim: Size of a head.
        threads: Threads that PyTorch may use.
        repeats: Timed rounds, after one that is not timed.
        seed: Of the random states.

    Returns:
        ``split_over_full`` and ``split_over_dense`` (medians of the ratios within each round),
        ``bound`` (the same two ratios if time were visible cells alone), ``seconds`` per
        attention (median, least, greatest), the measured matmul rate and the share of it that
        each attention reaches, the setting, the hardware and the versions.

    Raises:
        ValueError: If ``tokens`` is not at least two whole chunks.
    """
    if chunk < 1 or tokens % chunk or tokens < 2 * chunk:
        raise ValueError(
            f"the benchmark needs at least two whole chunks; {tokens} tokens are not a multiple "
            f"of chunks of {chunk}: choose tokens = n * chunk, n >= 2"
        )
    layout = _chunked(tokens, chunk)
    mask = dense_mask(layout)
    cells = {
        "split": int(mask.sum()),
        "full": tokens * (tokens + 1) // 2,
        "dense": tokens * tokens,
    }
    with _threads(threads):
        states = _states(tokens, heads, kv_heads, head_dim, seed)
        times = _take_turns(_attentions(layout, mask), states, repeats)
        rate = _matmul_rate()
    # Two products forward and five backward, two operations per cell and dimension.
    flops = {name: 14 * count * heads * head_dim for name, count in cells.items()}
    seconds = {name: _spread(values) for name, values in times.items()}
    return {
        "split_over_full": _ratio(times, "split", "full"),
        "split_over_dense": _ratio(times, "split", "dense"),
        "bound": {name: cells["split"] / cells[name] for name in ("full", "dense")},
        "seconds": seconds,
        "matmul_gflops": rate / 1e9,
        "share_of_matmul": {n: flops[n] / seconds[n]["median"] / rate for n in flops},
        "setting": {
            "tokens": tokens,
            "chunk": chunk,
            "heads": heads,
            "kv_heads": kv_heads,
            "head_dim": head_dim,
            "threads": threads,
            "repeats": repeats,
            "passes": "forward and backward",
            "dtype": "float32",
        },
        "hardware": hardware(),
        "versions": versions(),
    }


def _chunked(tokens: int, chunk: int) -> Layout:
    """Chunks of equal length; the last one is the query."""
    row = torch.arange(tokens)[None]
    is_query = row >= tokens - chunk
    index = (row // chunk).masked_fill(is_query, NO_CHUNK)
    return Layout(
        kind=torch.where(is_query, int(Kind.QUERY), int(Kind.CHUNK)),
        chunk=index,
        offset=row % chunk,
        position=row,
        order=row,
        group=index.masked_fill(is_query, GLOBAL),
        sample=torch.zeros_like(row),
        supersedes=torch.full_like(row, NO_ROW),
        until=torch.full_like(row, FOREVER),
    )


def _states(tokens: int, heads: int, kv_heads: int, dim: int, seed: int) -> list[Tensor]:
    """Query, key, value in the memory order that a model's projections leave them in."""
    draw = torch.Generator().manual_seed(seed)
    shapes = [(1, tokens, count, dim) for count in (heads, kv_heads, kv_heads)]
    return [torch.randn(s, generator=draw).transpose(1, 2).requires_grad_() for s in shapes]


def _attentions(layout: Layout, mask: Tensor) -> dict[str, Attention]:
    plan = SplitPlan(layout)

    def split(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return plan.attend(query, key, value, LayerRule(), Knobs(query.shape[-1] ** -0.5))

    def full(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        shared = query.shape[1] != key.shape[1]
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=shared)
        return out.transpose(1, 2)

    def dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        shared = query.shape[1] != key.shape[1]
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=shared)
        return out.transpose(1, 2)

    return {"split": split, "full": full, "dense": dense}


def _take_turns(
    attentions: dict[str, Attention], states: list[Tensor], repeats: int
) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in attentions}
    for turn in range(repeats + 1):
        for name, attention in attentions.items():
            seconds = _time(attention, states)
            if turn:  # the first round warms memory and threads up
                times[name].append(seconds)
    return times


def _time(attention: Attention, states: list[Tensor]) -> float:
    for state in states:
        state.grad = None
    query, _, value = states
    gradient = torch.ones(*query.transpose(1, 2).shape[:3], value.shape[-1])
    gc.collect()
    start = time.perf_counter()
    attention(*states).backward(gradient)
    return time.perf_counter() - start


def _matmul_rate(size: int = 2048, repeats: int = 5) -> float:
    """Floating-point operations per second of a square float32 product, the best of some."""
    left, right = torch.randn(size, size), torch.randn(size, size)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def _ratio(times: dict[str, list[float]], over: str, under: str) -> float:
    return statistics.median(a / b for a, b in zip(times[over], times[under], strict=True))


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "greatest": max(values)}


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
