"""What a model's own attention layers put into a cache, read without running the model."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from blocktune.models.sharded import gathered


class _Cached(Exception):
    """Carries keys and values out of a layer, before it attends."""


class _Tap:
    """Stands where the layer expects its cache."""

    def update(self, keys: Tensor, values: Tensor, *args, **kwargs) -> None:
        raise _Cached(keys, values)


def key_layers(model: nn.Module) -> dict[int, nn.Module]:
    """The attention modules that are handed rotary embeddings, by layer index."""
    found = {}
    for module in model.modules():
        takes = inspect.signature(module.forward).parameters
        attends = hasattr(module, "layer_idx") and hasattr(module, "scaling")
        if attends and {"position_embeddings", "past_key_values"} <= takes.keys():
            found[module.layer_idx] = module
    return found


@torch.no_grad()
def probe_cache(
    attention: nn.Module, rotary: nn.Module, position: Tensor, kind: str | None = None
) -> tuple[Tensor, Tensor]:
    """What a layer caches of one random state at several positions.

    Args:
        attention: One of `key_layers`.
        rotary: The module that makes cos and sin.
        position: ``(1, S)``.
        kind: The layer's type, where ``rotary`` has several sets of frequencies.

    Returns:
        Keys and values, float32 ``(1, K, S, D)`` on the CPU, the keys rotated as the layer
        rotates them.

    Raises:
        ValueError: If the layer does not hand keys to a cache.
    """
    weights = list(attention.parameters())
    # The codes of a quantised base are no dtype to compute in, and may be all there is.
    plain = [p.dtype for p in weights if p.is_floating_point() and p.element_size() > 1]
    dtype = plain[0] if plain else attention.config.dtype or torch.get_default_dtype()
    state = torch.randn(1, 1, _width(attention), generator=torch.Generator().manual_seed(0))
    state = state.expand(1, position.shape[1], -1).to(weights[0].device, dtype)
    angles = rotary(state, position.to(state.device), *([kind] if kind else []))
    try:
        with _evaluating(attention), gathered(*weights):
            attention(
                hidden_states=state,
                position_embeddings=angles,
                attention_mask=None,
                past_key_values=_Tap(),
            )
    except _Cached as cached:
        keys, values = cached.args
        return keys.float().cpu(), values.float().cpu()
    except Exception as error:
        raise ValueError(f"{type(attention).__name__} hides its keys: {error}") from error
    raise ValueError(
        f"{type(attention).__name__} (layer {attention.layer_idx}) keeps no keys of its own; "
        "blocktune caches the keys of every layer"
    )


def _width(attention: nn.Module) -> int:
    return attention.config.get_text_config().hidden_size


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Without dropout (of a LoRA, for one), which would make equal states differ."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
