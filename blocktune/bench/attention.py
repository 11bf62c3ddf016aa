"""Speed of split attention against full and dense-mask attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from blocktune.attention import SplitPlan, dense_mask
from blocktune.attention.kernels import AttentionParams
from blocktune.bench.timing import matmul_rate, ratios, spread, take_turns, threads
from blocktune.layout import LayerRule, Layout
from blocktune.prompt import LayoutSpec, Pieces, lay_out
from blocktune.provenance import provenance

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

    def layout(self) -> Layout:
        """Chunks of equal length; the last one is the query."""
        chunk = (0,) * self.chunk
        pieces = Pieces((), (chunk,) * (self.tokens // self.chunk - 1), chunk)
        return lay_out(pieces, LayoutSpec()).layout

    def states(self) -> list[Tensor]:
        """Random query, key and value in the memory order of a model's projections."""
        draw = torch.Generator().manual_seed(self.seed)
        heads = (self.heads, self.kv_heads, self.kv_heads)
        shapes = [(1, self.tokens, count, self.head_dim) for count in heads]
        return [torch.randn(s, generator=draw).transpose(1, 2).requires_grad_() for s in shapes]


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
    layout, states = bench.layout(), bench.states()
    mask = dense_mask(layout)
    params = AttentionParams(bench.head_dim**-0.5)
    sdpa = partial(F.scaled_dot_product_attention, enable_gqa=bench.heads != bench.kv_heads)
    attentions = {
        "split": partial(SplitPlan(layout).attend, rule=LayerRule(), params=params),
        "full": lambda *states: sdpa(*states, is_causal=True).transpose(1, 2),
        "dense": lambda *states: sdpa(*states, attn_mask=mask).transpose(1, 2),
    }
    gradient = torch.ones(1, bench.tokens, bench.heads, bench.head_dim)

    def work(attention: Callable[..., Tensor]) -> None:
        torch.autograd.grad(attention(*states), states, gradient)

    with threads(bench.threads):
        works = {name: partial(work, attention) for name, attention in attentions.items()}
        times = take_turns(works, bench.repeats)
        rate = matmul_rate(bench.repeats)
    total = bench.tokens * (bench.tokens + 1) // 2
    cells = {"split": int(mask.sum()), "full": total, "dense": bench.tokens**2}
    flops = {n: OPERATIONS * count * bench.heads * bench.head_dim for n, count in cells.items()}
    seconds = {name: spread(values) for name, values in times.items()}
    return {
        "split_over_full": spread(ratios(times, "split", "full"))["median"],
        "split_over_dense": spread(ratios(times, "split", "dense"))["median"],
        "bound": {name: cells["split"] / cells[name] for name in ("full", "dense")},
        "seconds": seconds,
        "matmul_gflops": rate / 1e9,
        "share_of_matmul": {n: flops[n] / seconds[n]["median"] / rate for n in flops},
        "setting": {**asdict(bench), "passes": "forward and backward", "dtype": "float32"},
        **provenance(bench.seed),
    }
