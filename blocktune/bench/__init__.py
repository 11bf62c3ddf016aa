"""Speed on this machine, and the best that the machine can do."""

from blocktune.bench.attention import AttentionBench, bench_attention
from blocktune.bench.reuse import bench_loading, bench_reuse
from blocktune.bench.timing import LOADING, TARGETS, TINY, ReuseBench

__all__ = [
    "LOADING",
    "TARGETS",
    "TINY",
    "AttentionBench",
    "ReuseBench",
    "bench_attention",
    "bench_loading",
    "bench_reuse",
]
