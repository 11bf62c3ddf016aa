"""Speed on this machine, and the best that the machine can do."""

from blocktune.bench.attention import bench_attention
from blocktune.bench.reuse import (
    LOADING,
    TARGETS,
    TINY,
    ReuseBench,
    bench_loading,
    bench_reuse,
)

__all__ = [
    "LOADING",
    "TARGETS",
    "TINY",
    "ReuseBench",
    "bench_attention",
    "bench_loading",
    "bench_reuse",
]
