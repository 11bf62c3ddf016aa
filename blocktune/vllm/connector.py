"""vLLM's connector interface; `SchedulerSide` and `WorkerSide` do the work.

vLLM's interface is experimental; docs/vllm.md lists the tested versions.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from vllm.config import CUDAGraphMode, VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorRole,
    KVConnectorTransferResults,
    SupportsHMA,
)
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from blocktune.vllm import guard
from blocktune.vllm.metrics import LoadMetrics, LoadStats
from blocktune.vllm.scheduler import LoadMeta, SchedulerSide
from blocktune.vllm.worker import WorkerSide

PLAIN_CACHE = ("auto", "float32", "float16", "bfloat16")
LEAST = {"host_gb": 0, "threads": 1, "encode_wait_s": 0}
OPTIONS = "store, adapters, fingerprint, host_gb (0 or more), threads (1), encode_wait_s (0)"
"""Keys of ``kv_connector_extra_config``; the least of numbers is in `LEAST`."""

guard.install()


class BlocktuneConnector(KVConnectorBase_V1, SupportsHMA):
    """Serves the first tokens of a prompt from a blocktune store.

    ``kv_connector_extra_config`` has ``store``, as ``--store``; ``host_gb``, each rank's memory for
    recently used chunks (1); ``threads``, loads at a time (2). Other keys are the route's. Raises
    ValueError if a configuration cannot be served.
    """

    _cache_hit_source = CacheHitSource.DISK

    def __init__(self, vllm_config, role, kv_cache_config):
        super().__init__(vllm_config, role, kv_cache_config)
        require_served_config(vllm_config)
        groups = kv_cache_config.kv_cache_groups
        self.scheduler = self.worker = None
        if role is KVConnectorRole.WORKER:
            self.worker = WorkerSide(vllm_config, groups)
            return
        # Failed blocks can be reported of one group only, and a full CUDA graph cannot wait.
        graphs = vllm_config.compilation_config.cudagraph_mode or CUDAGraphMode.NONE
        may_layer = len(groups) == 1 and graphs.mixed_mode() != CUDAGraphMode.FULL
        self.scheduler = SchedulerSide(may_layer)

    # In the scheduler process:

    def on_new_request(self, request) -> None:
        self.scheduler.admit(request)

    def get_num_new_matched_tokens(self, request, num_computed_tokens) -> tuple[int, bool]:
        return self.scheduler.matched(request, num_computed_tokens)

    def update_state_after_alloc(self, request, blocks, num_external_tokens) -> None:
        self.scheduler.allocated(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output) -> LoadMeta:
        return self.scheduler.take()

    def request_finished_all_groups(self, request, block_ids) -> tuple[bool, None]:
        """Sends nothing, so blocks may be freed at once."""
        self.scheduler.finished(request)
        return False, None

    # In a worker process:

    def start_load_kv(self, forward_context, **kwargs) -> None:
        meta = self._get_connector_metadata()
        idle = forward_context.attn_metadata is None and not kwargs
        if meta.forget:
            self.worker.store.clear()
        self.worker.start(meta.loads, forward_context.no_compile_layers, idle)

    def get_transfer_results(self, finished_req_ids) -> KVConnectorTransferResults:
        ended, failed = self.worker.finished()
        return KVConnectorTransferResults(finished_recving=ended, failed_recving=failed)

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self.worker.take_invalid()

    def get_kv_connector_stats(self) -> LoadStats | None:
        if self.worker is None or not self.worker.counts:
            return None
        counts, self.worker.counts = self.worker.counts, Counter()
        return LoadStats(data=dict(counts))

    def wait_for_layer_load(self, layer_name) -> None:
        self.worker.wait_for_layer(layer_name)

    def save_kv_layer(self, layer_name, kv_layer, attn_metadata, **kwargs) -> None:
        """Does nothing, since blocktune encodes the chunks."""

    def wait_for_save(self) -> None:
        pass

    def reset_cache(self) -> bool:
        """Drops the chunks in memory of all ranks before the next load."""
        self.scheduler.forget = True
        return True

    def shutdown(self) -> None:
        if self.worker is not None:
            self.worker.pool.shutdown(cancel_futures=True)

    # In either process:

    @property
    def requires_kv_delivery(self) -> bool:
        """False: nothing is passed to other engines."""
        return False

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> LoadStats:
        return LoadStats(data=data or {})

    @classmethod
    def build_prom_metrics(cls, *args) -> LoadMetrics:
        return LoadMetrics(*args)


def require_served_config(config: VllmConfig) -> None:
    """Refuses what was never shown to be right, by a ValueError of one line."""
    transfer, parallel = config.kv_transfer_config, config.parallel_config
    extra, cache = transfer.kv_connector_extra_config, config.cache_config.cache_dtype
    policy, store = transfer.kv_load_failure_policy, extra.get("store")
    changed = config.model_config.hf_overrides or config.model_config.hf_config_path
    odd = [f"{name}={extra[name]!r}" for name in sorted(extra) if not _is_option(name, extra[name])]
    ranks = parallel.decode_context_parallel_size, parallel.prefill_context_parallel_size
    reasons = {
        f"needs kv_connector_extra_config {{'store': FOLDER}}, got {store!r}": not store,
        f"takes kv_connector_extra_config with {OPTIONS}; got {', '.join(odd)}": odd,
        f"needs kv_load_failure_policy 'fail', got '{policy}': a chunk that cannot be read must "
        "fail the request, or full attention is mixed in": policy != "fail",
        f"writes {', '.join(PLAIN_CACHE)} caches, not {cache}": cache not in PLAIN_CACHE,
        "loads no draft model's cache; drop speculative decoding": config.speculative_config,
        "loads no routing; drop --enable-return-routed-experts": config.aux_output_config.enabled,
        "cannot move latent keys (MLA); use a RoPE model": config.model_config.use_mla,
        "writes whole chunks in each rank; drop context parallelism": max(ranks) > 1,
        "reads chunks that were encoded by the model's config.json; change it there, not by "
        "hf_overrides or hf_config_path, and encode again": changed,
    }
    if reason := next((text for text, applies in reasons.items() if applies), None):
        raise ValueError(f"BlocktuneConnector {reason}")


def _is_option(name: str, value: Any) -> bool:
    if name in LEAST:
        return isinstance(value, int | float) and LEAST[name] <= value < math.inf
    return name in ("adapters", "fingerprint") or (name == "store" and isinstance(value, str))
