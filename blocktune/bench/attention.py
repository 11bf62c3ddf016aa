"""Benchmark of split attention against full attention and attention with a dense mask."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from blocktune.attention import SplitPlan, dense_mask
from blocktune.attention.kernels import AttentionParams
from blocktune.bench.reuse import rates, ratios, spread, take_turns, threads
from blocktune.layout import LayerRule
from blocktune.prompt import LayoutSpec, Pieces, lay_out
from blocktune.provenance import provenance

HEADS, KV_HEADS, HEAD_DIM, THREADS, SEED = 8, 8, 64, 2, 0
# FLOPs per visible cell and dimension: two products forward, five backward, two FLOPs each.
OPERATIONS = 14


def bench_attention(tokens: int = 8192, chunk: int = 512, repeats: int = 5) -> dict[str, Any]:
    """Times one layer of attention, forward and backward, in float32 on the CPU.

    Split attention, full causal SDPA (``full``) and SDPA with the block mask as a dense tensor
    (``dense``) run in turn. Masks and plans, made once per batch, are not timed. The last ``chunk``
    tokens are the query, which sees everything. ``bound`` holds the ratios by visible cells alone.
    """
    if chunk < 1 or tokens % chunk or tokens < 2 * chunk:
        wanted = f"tokens must be two or more whole chunks of {chunk}, got {tokens}"
        raise ValueError(f"{wanted}; choose tokens = n * chunk, n >= 2")
    block = (0,) * chunk
    layout = lay_out(Pieces((), (block,) * (tokens // chunk - 1), block), LayoutSpec()).layout
    mask = dense_mask(layout)
    draw = torch.Generator().manual_seed(SEED)
    states = [  # query, key and value in the memory order of a model's projections
        torch.randn(1, tokens, heads, HEAD_DIM, generator=draw).transpose(1, 2).requires_grad_()
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]
    gradient = torch.ones(1, tokens, HEADS, HEAD_DIM)
    sdpa, params = F.scaled_dot_product_attention, AttentionParams(HEAD_DIM**-0.5)
    attentions = {
        "split": partial(SplitPlan(layout).attend, rule=LayerRule(), params=params),
        "full": lambda *states: sdpa(*states, is_causal=True).transpose(1, 2),
        "dense": lambda *states: sdpa(*states, attn_mask=mask).transpose(1, 2),
    }

    def work(attention: Callable[..., Tensor]) -> None:
        torch.autograd.grad(attention(*states), states, gradient)

    with threads(THREADS):
        works = {name: partial(work, attention) for name, attention in attentions.items()}
        times = take_turns(works, repeats)
        _, rate = rates(repeats)
    cells = {"split": int(mask.sum()), "full": tokens * (tokens + 1) // 2, "dense": tokens**2}
    flops = {name: OPERATIONS * count * HEADS * HEAD_DIM for name, count in cells.items()}
    seconds = {name: spread(values) for name, values in times.items()}
    sizes = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "threads": THREADS}
    return {
        "split_over_full": spread(ratios(times, "split", "full"))["median"],
        "split_over_dense": spread(ratios(times, "split", "dense"))["median"],
        "bound": {name: cells["split"] / cells[name] for name in ("full", "dense")},
        "seconds": seconds,
        "matmul_gflops": rate / 1e9,
        "share_of_matmul": {n: flops[n] / seconds[n]["median"] / rate for n in flops},
        "setting": {
            **{"tokens": tokens, "chunk": chunk, "repeats": repeats, "dtype": "float32", **sizes},
            **{"seed": SEED, "passes": "forward and backward"},
        },
        **provenance(SEED),
    }
