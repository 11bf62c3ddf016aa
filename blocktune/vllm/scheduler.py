"""The connector's half in vLLM's scheduler: which requests load, and into which blocks.

A request with a plan never falls back to computing chunks: vLLM would do that in full attention.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata

from blocktune.vllm.plan import LoadPlan

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.request import Request


@dataclass(frozen=True)
class Load:
    """One request's load."""

    request_id: str
    plan: LoadPlan | None  # what to load; None: the request fails
    start: int  # tokens that vLLM already has; the rest of the plan is loaded
    blocks: tuple[list[int], ...]  # the request's blocks in each KV cache group
    fault: str = ""  # why the request fails
    layered: bool = False  # whether the forward pass of this step waits for each layer


@dataclass
class LoadMeta(KVConnectorMetadata):
    """The loads that begin in one step; ``forget``: first drop the chunks in memory."""

    loads: list[Load] = field(default_factory=list)
    forget: bool = False


class SchedulerSide:
    """Admits requests, and passes their loads to the workers."""

    def __init__(self, may_layer: bool):
        """With ``may_layer``, a request that runs alone is loaded during its own forward pass."""
        self.may_layer = may_layer
        self._live: set[str] = set()
        self._layered: str | None = None
        self._plans: dict[str, LoadPlan | str] = {}  # or why the request fails
        self._pending: list[Load] = []
        self.forget = False

    def admit(self, request: Request) -> None:
        """Reads a new request's plan, and gives it its own namespace in vLLM's cache."""
        self._live.add(request.request_id)
        try:
            plan = LoadPlan.read(request.kv_transfer_params, request.prompt_token_ids)
        except ValueError as error:
            self._plans[request.request_id] = str(error)
            return
        # vLLM switches connectors off for prompt log probabilities. Such a request, which the guard
        # refuses, is computed in full, so it must not use the plan's namespace.
        if plan is None or request.skip_reading_prefix_cache:
            return
        self._plans[request.request_id] = plan
        request.cache_salt = plan.salt(request.cache_salt)
        request.block_hashes.clear()
        request.update_block_hashes()

    def matched(self, request: Request, computed: int) -> tuple[int, bool]:
        """How many tokens to load after the first ``computed``; whether the request waits."""
        plan, self._layered = self._plans.get(request.request_id), None
        if isinstance(plan, str):
            return 1, True  # any number, since the request fails while it waits for them
        if plan is None or computed >= plan.num_tokens:
            return 0, False
        # A single remaining token may be decoded by a captured graph, which cannot wait.
        several = request.num_tokens > plan.num_tokens + 1
        if self.may_layer and several and self._live == {request.request_id}:
            self._layered = request.request_id
        return plan.num_tokens - computed, self._layered is None

    def allocated(self, request: Request, blocks: KVCacheBlocks, num_external: int) -> None:
        """Records a load once the request has blocks for it."""
        if not num_external:
            return
        name, plan = request.request_id, self._plans[request.request_id]
        if isinstance(plan, str):
            self._pending.append(Load(name, None, 0, (), plan))
            return
        where = plan.num_tokens - num_external, blocks.get_block_ids()
        self._pending.append(Load(name, plan, *where, layered=self._layered == name))

    def take(self) -> LoadMeta:
        """The loads recorded since the last call."""
        meta, self._pending, self.forget = LoadMeta(self._pending, self.forget), [], False
        return meta

    def finished(self, request: Request) -> None:
        """Forgets a request."""
        self._plans.pop(request.request_id, None)
        self._live.discard(request.request_id)
