"""Models without chunk reuse: recurrent (Mamba, gated delta rules, hybrids) or GPT-2.

They can reuse no chunks, which their states or positions tie to what comes before, but whole
prefixes: stock transformers continue from the state after the last token.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from blocktune.attention.interface import cache_argument


@dataclass(frozen=True)
class Recurrence:
    """How a model continues from a cache."""

    argument: str  # name of the cache argument of `forward`
    several: bool  # whether a pass over several tokens does (Jamba's starts from zero)
    last_only: bool  # whether it can return only the last logits
    has_states: bool = True  # whether layers are recurrent; else it has absolute positions

    @property
    def refusal(self) -> str:
        """Error for an attempt to reuse chunks; ``{}`` is what attempted it."""
        why = "no rotary position embedding (RoPE), so cached chunks cannot be moved; use recycle,"
        if self.has_states:
            why = "recurrent layers, whose state mixes a chunk with all tokens before it; use"
        how = "prefix-cache, full-prefill or no-context"
        return f"{{}} reuses chunks, but this model has {why} {how}"

    def run(self, model: PreTrainedModel, cache: DynamicCache, ids: Tensor, fresh: bool) -> Tensor:
        """Appends ``ids`` ``(1, S)`` to the cache. Returns the logits ``(1, V)`` after them."""
        more = {"logits_to_keep": 1} if self.last_only else {}
        steps = [ids] if fresh or self.several else ids.split(1, dim=1)
        for step in steps:
            output = model(step, use_cache=True, **{self.argument: cache}, **more)
        return output.logits[:, -1]


@torch.no_grad()
def find_recurrence(model: PreTrainedModel, always: bool = False) -> Recurrence | None:
    """Finds how a model with recurrent layers (or ``always``) continues from a cache; else None.

    Eight tokens are run in one pass and in two, to check that the second continues from the first.
    Raises ValueError if it does not, or if the model also has sliding windows.
    """
    try:
        cache = DynamicCache(config=model.config)
    except (KeyError, AttributeError):  # the cache does not support some layer type
        return None
    has_states = any(isinstance(la, LinearAttentionCacheLayerMixin) for la in cache.layers)
    if not has_states and not always:
        return None
    name = type(model).__name__
    if any(cache.is_sliding):
        raise ValueError(f"{name} has recurrent layers and sliding windows, which is not supported")
    takes = inspect.signature(model.forward).parameters
    if (argument := cache_argument(model)) is None:
        raise ValueError(f"{name} has no cache argument named as in transformers")
    ids = (torch.arange(8, device=model.device) % model.config.vocab_size)[None]
    whole, alone = (model(part, use_cache=False).logits[:, -1] for part in (ids, ids[:, 4:]))
    for several in (True, False):
        recurrence = Recurrence(argument, several, "logits_to_keep" in takes, has_states)
        cache = DynamicCache(config=model.config)
        try:
            recurrence.run(model, cache, ids[:, :4], fresh=True)
            error = (recurrence.run(model, cache, ids[:, 4:], fresh=False) - whole).abs().max()
        except (ValueError, TypeError, AttributeError):  # needs its own cache class (MiniMax)
            break
        # Rounding errors are far below the effect of the first four tokens; a lost state is not.
        if error <= 0.1 * (alone - whole).abs().max():
            return recurrence
    raise ValueError(
        f"{name} does not continue from its own cache (it may keep a state outside transformers' "
        "cache layers), so its prefixes cannot be reused; use another hybrid, such as Qwen3-Next"
    )
