"""The connector's half in vLLM's scheduler: which requests load, and into which blocks.

A request with a plan is loaded whole or fails. It never falls back to computing the chunks:
vLLM would do that in full attention, which is neither what was asked nor what is cached.
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

    request_id: str  # of the request
    plan: LoadPlan | None  # what is loaded, or None if the request fails
    start: int  # tokens that vLLM has already; it loads up to the end of the plan
    blocks: tuple[list[int], ...]  # the request's blocks, by kv cache group
    fault: str = ""  # why the request fails
    layered: bool = False  # whether the forward pass of this step waits for each layer


@dataclass
class LoadMeta(KVConnectorMetadata):
    """The loads that begin in one step; ``forget``: hot chunks are dropped before."""

    loads: list[Load] = field(default_factory=list)
    forget: bool = False


class SchedulerSide:
    """Admits requests, and passes their loads to the workers."""

    def __init__(self, may_layer: bool):
        """With ``may_layer`` a request that is alone is loaded beside its own forward pass.

        With others there, that would hold up their decoding.
        """
        self.may_layer = may_layer
        self._live: set[str] = set()
        self._layered: str | None = None
        self._asked: dict[str, LoadPlan | str] = {}
        self._pending: list[Load] = []
        self.forget = False

    def admit(self, request: Request) -> None:
        """Reads a new request's plan, and gives it its own namespace in vLLM's cache."""
        self._live.add(request.request_id)
        try:
            plan = LoadPlan.read(request.kv_transfer_params, request.prompt_token_ids)
        except ValueError as error:
            self._asked[request.request_id] = str(error)
            return
        # Prompt log probabilities switch connectors off: such a request (the guard refuses it) is
        # computed in full, so it must not be filed with the plan's.
        if plan is None or request.skip_reading_prefix_cache:
            return
        self._asked[request.request_id] = plan
        request.cache_salt = plan.salt(request.cache_salt)
        request.block_hashes.clear()
        request.update_block_hashes()

    def matched(self, request: Request, computed: int) -> tuple[int, bool]:
        """Tokens to load beyond the first ``computed``, and whether the request waits for them.

        No tokens for a request that loads nothing.
        """
        asked, self._layered = self._asked.get(request.request_id), None
        if isinstance(asked, str):
            return 1, True  # any number: the request fails while it waits for them
        if asked is None or computed >= asked.num_tokens:
            return 0, False
        # One token alone may be decoded by a captured graph, which waits for nothing.
        several = request.num_tokens > asked.num_tokens + 1
        if self.may_layer and several and self._live == {request.request_id}:
            self._layered = request.request_id
        return asked.num_tokens - computed, self._layered is None

    def allocated(self, request: Request, blocks: KVCacheBlocks, num_external: int) -> None:
        """Notes a load once the request has blocks for it."""
        if not num_external:
            return
        asked = self._asked[request.request_id]
        if isinstance(asked, str):
            load = Load(request.request_id, None, 0, (), asked)
        else:
            start = asked.num_tokens - num_external
            layered = self._layered == request.request_id
            load = Load(request.request_id, asked, start, blocks.get_block_ids(), "", layered)
        self._pending.append(load)

    def take(self) -> LoadMeta:
        """The loads noted since the last call."""
        meta, self._pending, self.forget = LoadMeta(self._pending, self.forget), [], False
        return meta

    def finished(self, request: Request) -> None:
        """Forgets a request."""
        self._asked.pop(request.request_id, None)
        self._live.discard(request.request_id)
