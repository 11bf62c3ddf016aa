"""Refuses what a plan excludes when a request arrives, for every route and for Python."""

from __future__ import annotations

from functools import wraps

from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from blocktune.vllm.plan import PARAMS

MARK = "_blocktune"


def require_loadable(params: SamplingParams) -> None:
    """Checks the sampling parameters of a request that has a plan.

    A VLLMValidationError, HTTP 400, if it asks for log probabilities of the prompt: vLLM would
    compute the prompt in full attention and keep that under the plan's name.
    """
    transfer = (params.extra_args or {}).get("kv_transfer_params")
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


def install() -> None:
    """Adds `require_loadable` to what vLLM verifies before a request enters the engine."""
    verify = SamplingParams.verify
    if hasattr(verify, MARK):
        return

    @wraps(verify)
    def verified(self, *args, **kwargs):
        require_loadable(self)
        return verify(self, *args, **kwargs)

    setattr(verified, MARK, True)
    SamplingParams.verify = verified
