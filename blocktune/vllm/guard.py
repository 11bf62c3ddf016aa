"""Refuses what a plan excludes when a request arrives, for every route and for Python."""

from __future__ import annotations

from functools import wraps
from typing import TYPE_CHECKING

from vllm.exceptions import VLLMValidationError
from vllm.v1.engine.input_processor import InputProcessor

from blocktune.vllm.plan import PARAMS, LoadPlan

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreRequest

MARK = "_blocktune"


def require_loadable(request: EngineCoreRequest) -> None:
    """Checks a request that has a plan; a VLLMValidationError, HTTP 400, says what is wrong.

    Log probabilities of the prompt are refused: vLLM would compute the prompt in full attention
    and keep that under the plan's name.
    """
    params = request.sampling_params
    transfer = params and (params.extra_args or {}).get("kv_transfer_params")
    if not isinstance(transfer, dict) or transfer.get(PARAMS) is None:
        return
    asked = params.prompt_logprobs is not None
    if asked or getattr(params, "prompt_logprob_token_ids", None) is not None:
        raise VLLMValidationError(
            "prompt_logprobs cannot be had of a prompt from cached chunks; leave it out, or send "
            "the prompt without documents"
        )
    if params.skip_reading_prefix_cache:
        raise VLLMValidationError("skip_reading_prefix_cache excludes cached chunks; leave it out")
    try:
        LoadPlan.read(transfer, request.prompt_token_ids)
    except ValueError as error:
        raise VLLMValidationError(str(error)) from None


def install() -> None:
    """Adds `require_loadable` to what vLLM does before a request enters the engine."""
    process = InputProcessor.process_inputs
    if hasattr(process, MARK):
        return

    @wraps(process)
    def checked(self, *args, **kwargs):
        request = process(self, *args, **kwargs)
        require_loadable(request)
        return request

    setattr(checked, MARK, True)
    InputProcessor.process_inputs = checked
