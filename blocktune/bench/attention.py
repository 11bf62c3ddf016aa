"""Speed of split attention against full and dense-mask attention."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from blocktune.attention import SplitPlan, dense_mask
from blocktune.attention.kernels import AttentionParams
from blocktune.bench.timing import Times, matmul_rate, ratio, spread, take_turns, threads
from blocktune.layout import FOREVER, GLOBAL, NO_CHUNK, NO_ROW, Kind, LayerRule, Layout
from blocktune.provenance import provenance

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
OPERATIONS = 14
"""Per visible cell and dimension: two products forward and five backward, two operations each."""


@dataclass(frozen=True)
class AttentionBench:
    """Sizes of the timed attention layer.

    Attributes:
        tokens: Rows of the prompt.
        chunk: Tokens per chunk; the last ``chunk`` tokens are the query, which sees everything.
        heads: Query heads.
        kv_heads: Key-value heads.
        head_dim: Size of a head.
        threads: Threads that PyTorch may use.
        repeats: Timed rounds, after one that is not timed.
        seed: Of the random states.

    Raises:
        ValueError: If ``tokens`` is not at least two whole chunks.
    """

    tokens: int = 8192
    chunk: int = 512
    heads: int = 8
    kv_heads: int = 8
    head_dim: int = 64
    threads: int = 2
    repeats: int = 5
    seed: int = 0

    def __post_init__(self):
        if self.chunk < 1 or self.tokens % self.chunk or self.tokens < 2 * self.chunk:
            raise ValueError(
                f"the benchmark needs at least two whole chunks; {self.tokens} tokens are not a "
                f"multiple of chunks of {self.chunk}: choose tokens = n * chunk, n >= 2"
            )


def bench_attention(bench: AttentionBench | None = None) -> dict[str, Any]:
    """Times one layer of attention, forward and backward, on the CPU.

    Split attention, full causal SDPA (``full``) and SDPA with the same visibility as a dense mask
    (``dense``) take turns. Masks and plans are made beforehand, as a batch makes them once for all
    layers.

    Returns:
        ``split_over_full`` and ``split_over_dense`` (medians of the ratios within each round),
        ``bound`` (the same two ratios if time were visible cells alone), ``seconds`` per
        attention (median, least, greatest), the measured matmul rate and the share of it that
        each attention reaches, the setting and the provenance.
    """
    bench = bench or AttentionBench()
    layout = _chunked(bench.tokens, bench.chunk)
    mask = dense_mask(layout)
    with threads(bench.threads):
        states = _states(bench)
        attentions = _attentions(layout, mask)
        works = {name: _timed(attention, states) for name, attention in attentions.items()}
        times = take_turns(works, bench.repeats)
        rate = matmul_rate()
    cells = {
        "split": int(mask.sum()),
        "full": bench.tokens * (bench.tokens + 1) // 2,
        "dense": bench.tokens**2,
    }
    return _report(bench, times, cells, rate)


def _report(
    bench: AttentionBench, times: Times, cells: dict[str, int], rate: float
) -> dict[str, Any]:
    """The numbers as `bench_attention` returns them; ``rate`` is in operations per second."""
    flops = {n: OPERATIONS * count * bench.heads * bench.head_dim for n, count in cells.items()}
    seconds = {name: spread(values) for name, values in times.items()}
    return {
        "split_over_full": ratio(times, "split", "full"),
        "split_over_dense": ratio(times, "split", "dense"),
        "bound": {name: cells["split"] / cells[name] for name in ("full", "dense")},
        "seconds": seconds,
        "matmul_gflops": rate / 1e9,
        "share_of_matmul": {n: flops[n] / seconds[n]["median"] / rate for n in flops},
        "setting": {**asdict(bench), "passes": "forward and backward", "dtype": "float32"},
        **provenance(bench.seed),
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


def _states(bench: AttentionBench) -> list[Tensor]:
    """Query, key and value in the memory order of a model's projections."""
    draw = torch.Generator().manual_seed(bench.seed)
    heads = (bench.heads, bench.kv_heads, bench.kv_heads)
    shapes = [(1, bench.tokens, count, bench.head_dim) for count in heads]
    return [torch.randn(s, generator=draw).transpose(1, 2).requires_grad_() for s in shapes]


def _attentions(layout: Layout, mask: Tensor) -> dict[str, Attention]:
    plan = SplitPlan(layout)

    def split(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return plan.attend(query, key, value, LayerRule(), AttentionParams(query.shape[-1] ** -0.5))

    def full(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        shared = query.shape[1] != key.shape[1]
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=shared)
        return out.transpose(1, 2)

    def dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        shared = query.shape[1] != key.shape[1]
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=shared)
        return out.transpose(1, 2)

    return {"split": split, "full": full, "dense": dense}


def _timed(attention: Attention, states: list[Tensor]) -> Callable[[], float]:
    """A work that clears gradients before the clock starts."""
    query, _, value = states
    gradient = torch.ones(*query.transpose(1, 2).shape[:3], value.shape[-1])

    def work() -> float:
        for state in states:
            state.grad = None
        gc.collect()
        start = time.perf_counter()
        attention(*states).backward(gradient)
        return time.perf_counter() - start

    return work
