"""Counters of loads for vLLM's log and its Prometheus endpoint.

Loaded tokens also count in vLLM's own ``vllm:external_prefix_cache_hits``.
"""

from __future__ import annotations

from collections import Counter

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)

COUNTS = {
    "loads": "Requests whose chunks were loaded.",
    "layered": "Of these, loads during the forward pass, which waited layer by layer.",
    "failed": "Requests that failed because chunks were missing or damaged.",
    "tokens": "Tokens written into vLLM's cache.",
    "store_reads": "Chunks read from the store.",
    "store_bytes": "Bytes read from the store.",
    "host_hits": "Chunks found in the rank's memory.",
    "load_us": "Microseconds spent on loads.",
}


class LoadStats(KVConnectorStats):
    """Sums of `COUNTS` over ranks and steps."""

    def reset(self) -> None:
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> LoadStats:
        self.data = dict(Counter(self.data) + Counter(other.data))
        return self

    def reduce(self) -> dict[str, int | float]:
        return dict(self.data)

    def is_empty(self) -> bool:
        return not self.data


class LoadMetrics(KVConnectorPromMetrics):
    """``vllm:blocktune_NAME`` for each of `COUNTS`, summed over tensor-parallel ranks."""

    def __init__(self, config, metric_types, labelnames, values):
        super().__init__(config, metric_types, labelnames, values)
        self._counters = {engine: {} for engine in values}
        for name, text in COUNTS.items():
            counter = self._counter_cls(f"vllm:blocktune_{name}", text, labelnames)
            for engine, labels in values.items():
                self._counters[engine][name] = counter.labels(*labels)

    def observe(self, transfer_stats_data, engine_idx=0) -> None:
        for name, count in transfer_stats_data.items():
            self._counters[engine_idx][name].inc(count)
