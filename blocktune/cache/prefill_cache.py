"""The cache of one prompt in a model that transformers runs as it is."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from blocktune.cache.exact import State
from blocktune.cache.prefix_tree import PrefixMatch


class PrefillCache(DynamicCache):
    """Transformers' own cache, filled from the first token on or resumed from an exact prefix.

    Attributes:
        exact: Whatever fills it is: tokens are computed in order, and only a `PrefixMatch`, which
            holds exact states, can be loaded.
        num_columns: Tokens in it; whoever runs the model adds them.
    """

    exact = True

    def __init__(self, config):
        """Takes the model's configuration."""
        super().__init__(config=config)
        self.num_columns = 0

    def state(self) -> State:
        """A copy of the recurrent state after the tokens so far."""
        pairs = [(la.conv_states[i], la.recurrent_states[i]) for la, i in self._recurrent()]
        return tuple(None if t is None else t.clone() for pair in pairs for t in pair)

    def resume(self, match: PrefixMatch) -> None:
        """Fills the empty cache with a known prefix."""
        if not match.num_tokens:
            return
        with_keys = [layer for layer in self.layers if hasattr(layer, "keys")]
        for layer, (keys, values) in zip(with_keys, match.layers(), strict=True):
            layer.update(torch.cat(keys, 1)[None], torch.cat(values, 1)[None])
        states = iter(match.state or ())
        for layer, index in self._recurrent():
            _put(layer.update_conv_state, next(states), index)
            _put(layer.update_recurrent_state, next(states), index)
        self.num_columns = match.num_tokens

    def key_bytes(self) -> int:
        """Bytes of keys and values."""
        kinds = (getattr(layer, kind, None) for layer in self.layers for kind in ("keys", "values"))
        return sum(tensor.nbytes for tensor in kinds if tensor is not None)

    def _recurrent(self) -> list[tuple[LinearAttentionCacheLayerMixin, int]]:
        layers = [x for x in self.layers if isinstance(x, LinearAttentionCacheLayerMixin)]
        return [(layer, index) for layer in layers for index in range(layer.number_of_states)]


def _put(update, state: Tensor | None, index: int) -> None:
    if state is not None:
        update(state, index)  # copies it into memory of the cache's own
