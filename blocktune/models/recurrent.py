"""Models that stock transformers runs: recurrent (Mamba, gated delta rules, hybrids) or GPT-2.

A state mixes all tokens before it, so a chunk of such a model cannot be encoded alone and reused
elsewhere, nor can one of a model that adds absolute positions to its states. A whole prefix can:
its state after the last token is all that it takes to go on.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import LinearAttentionCacheLayerMixin


@dataclass(frozen=True)
class Recurrence:
    """How a model continues from a cache.

    Mamba-1 layers (Jamba) start from zero unless they get one token at a time: not ``several``.
    """

    argument: str  # what its `forward` calls the cache
    several: bool  # whether a pass over several tokens continues from a state
    last_only: bool  # whether it can leave out all logits but the last
    has_states: bool = True  # whether layers are recurrent; else it attends at absolute positions

    @property
    def refusal(self) -> str:
        """Why no chunk is reused; its gap names who wants to."""
        if self.has_states:
            return (
                "{} reuses chunks, but this model has recurrent layers, whose state mixes a chunk "
                "with all tokens before it; use prefix-cache, full-prefill or no-context"
            )
        return (
            "{} reuses chunks, but this model has no rotary position embedding (RoPE), so cached "
            "chunks cannot be moved; use recycle, prefix-cache, full-prefill or no-context"
        )

    def run(self, model: PreTrainedModel, cache: DynamicCache, ids: Tensor, fresh: bool) -> Tensor:
        """Logits ``(1, V)`` after ``ids`` ``(1, S)``, which the cache holds then."""
        more = {"logits_to_keep": 1} if self.last_only else {}
        steps = [ids] if fresh or self.several else ids.split(1, dim=1)
        for step in steps:
            output = model(step, use_cache=True, **{self.argument: cache}, **more)
        return output.logits[:, -1]


@torch.no_grad()
def find_recurrence(model: PreTrainedModel, always: bool = False) -> Recurrence | None:
    """How a model with recurrent layers continues from a cache; None if it has no such layer.

    ``always`` asks it of a model that only attends, too.

    Eight tokens are run, in one pass and in two, to see that the second continues from the first.
    Raises ValueError if it does not, or the model has sliding windows as well.
    """
    try:
        cache = DynamicCache(config=model.config)
    except (KeyError, AttributeError):  # a kind of layer that this cache does not know
        return None
    has_states = any(isinstance(la, LinearAttentionCacheLayerMixin) for la in cache.layers)
    if not has_states and not always:
        return None
    name = type(model).__name__
    if any(cache.is_sliding):
        raise ValueError(f"{name} has recurrent layers and sliding windows, which are not served")
    takes = inspect.signature(model.forward).parameters
    argument = next((a for a in ("past_key_values", "cache_params") if a in takes), None)
    if argument is None:
        raise ValueError(f"{name} takes no cache by a name that transformers uses")
    ids = (torch.arange(8, device=model.device) % model.config.vocab_size)[None]
    whole, alone = (model(part, use_cache=False).logits[:, -1] for part in (ids, ids[:, 4:]))
    for several in (True, False):
        made = Recurrence(argument, several, "logits_to_keep" in takes, has_states)
        cache = DynamicCache(config=model.config)
        try:
            made.run(model, cache, ids[:, :4], fresh=True)
            error = (made.run(model, cache, ids[:, 4:], fresh=False) - whole).abs().max()
        except (ValueError, TypeError, AttributeError):  # takes a cache of its own only (MiniMax)
            break
        # Rounding is far below what the first four tokens change, a lost state is not.
        if error <= 0.1 * (alone - whole).abs().max():
            return made
    raise ValueError(
        f"{name} does not go on from its own cache (another state than transformers' cache layers "
        "keep?), so no prefix of it can be reused; use a hybrid that does, such as Qwen3-Next"
    )
