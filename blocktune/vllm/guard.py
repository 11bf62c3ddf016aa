"""Refuses, on every route, requests that cannot be answered from their plan."""

from __future__ import annotations

from functools import cache, wraps

from vllm.exceptions import VLLMValidationError
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.input_processor import InputProcessor

from blocktune.cache.store.shelf import StoreView
from blocktune.vllm.plan import PARAMS, LoadPlan


def require_loadable(request: EngineCoreRequest, store: str | None) -> None:
    """Raises VLLMValidationError (HTTP 400) if a request has a plan that cannot be loaded.

    ``store`` is the connector's; None: there is none. Chunks that a folder lacks are queued. A
    remote is not asked, since that takes too long: its requests fail while they load.
    """
    if (request.cache_salt or "").startswith(f"{PARAMS}:"):
        raise VLLMValidationError(
            f"cache_salt must not start with '{PARAMS}:', as those of cached chunks do"
        )
    params = request.sampling_params
    transfer = params and (params.extra_args or {}).get("kv_transfer_params")
    try:
        plan = LoadPlan.read(transfer, request.prompt_token_ids)
    except ValueError as error:
        raise VLLMValidationError(str(error)) from None
    if plan is None:
        return
    # vLLM would compute the prompt in full attention, and cache that in the plan's namespace.
    if params.prompt_logprobs is not None or params.prompt_logprob_token_ids is not None:
        raise VLLMValidationError(
            "prompt_logprobs cannot be computed for a prompt from cached chunks; leave it out, or "
            "send the prompt without documents"
        )
    if params.skip_reading_prefix_cache:
        raise VLLMValidationError("skip_reading_prefix_cache excludes cached chunks; leave it out")
    if store is None:
        raise VLLMValidationError(
            "this vLLM runs without BlocktuneConnector, and would compute the chunks in full"
        )
    view = _view(store)
    if view.config.remote is not None:
        return
    if missing := plan.missing(view.has):
        if view.manifest(plan.fingerprint) is None:  # nothing would ever encode them
            raise VLLMValidationError(
                f"the store '{view.place}' has no model of fingerprint {plan.fingerprint[:12]}; "
                "encode some chunks with that model, adapter and wording (`blocktune encode`)"
            )
        view.queue.add(plan.fingerprint, [segment.wanted for segment in missing])
        raise VLLMValidationError(
            f"{len(missing)} of {len(plan.segments)} segments are not in the store "
            f"'{view.place}'; encode them (`blocktune encode --follow`) and ask again"
        )


_view = cache(StoreView)


@cache
def install() -> None:
    """Makes vLLM call `require_loadable` before a request enters the engine."""
    process = InputProcessor.process_inputs

    @wraps(process)
    def checked(self, *args, **kwargs):
        request = process(self, *args, **kwargs)
        transfer = self.vllm_config.kv_transfer_config
        ours = transfer is not None and transfer.kv_connector == "BlocktuneConnector"
        require_loadable(request, transfer.kv_connector_extra_config["store"] if ours else None)
        return request

    InputProcessor.process_inputs = checked
