"""What a model must be, asked in one place: its keys can be moved, and every layer caches keys.

Serving and training call `require_supported` before anything else. Nothing runs through the whole
model: each attention layer is asked for the keys that it makes of one random state.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from blocktune.models.sharded import gathered
from blocktune.positions.relocation import RopeSpec, relocate_keys

FIXED_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""RoPE types whose frequencies do not depend on the length of the prompt."""


def require_supported(model: PreTrainedModel) -> RopeSpec:
    """Refuses a model whose cached chunks could not be moved; returns the frequencies to move by.

    Reads the frequencies that the model itself rotates with, and compares in every layer the keys
    of one random state at two positions with the moved ones (two tokens through each key
    projection). A model that rotates otherwise (adjacent pairs as Cohere and GLM, latent keys) is
    found by this, whatever its configuration says. Two layers of random weights, made from the
    configuration, give the same answer as the whole model, which may be a PEFT model, quantised or
    split over processes.

    Raises:
        ValueError: In one line, the property that prevents it: no rotary embedding,
            frequencies that depend on the prompt's length (dynamic, longrope), layers that keep
            no keys, or keys that `relocate_keys` does not reproduce.
    """
    config = model.config.get_text_config()
    rotary = next((m for name, m in model.named_modules() if name.endswith("rotary_emb")), None)
    if rotary is None:
        raise ValueError(
            f"{type(model).__name__} has no rotary position embedding; blocktune moves cached "
            "chunks by rotating their keys: use a RoPE model"
        )
    kinds: list[str | None] = [None] * config.num_hidden_layers
    if isinstance(rotary.rope_type, dict):  # Gemma 3: one set of frequencies for each layer type
        kinds = config.layer_types
    for kind in set(kinds):
        rope_type = rotary.rope_type[kind] if kind else rotary.rope_type
        if rope_type not in FIXED_ROPE_TYPES:
            raise ValueError(
                f"{type(model).__name__} uses RoPE type '{rope_type}', whose frequencies change "
                "with the prompt's length, so a rotated key cannot be moved; supported: "
                f"{', '.join(FIXED_ROPE_TYPES)} (set rope_parameters if one of them fits)"
            )
    layers = key_layers(model)
    if sorted(layers) != list(range(len(kinds))):
        raise ValueError(
            f"{type(model).__name__} has {len(kinds)} layers, of which {len(layers)} make keys "
            "from rotary embeddings; use a decoder in which every layer does"
        )
    return RopeSpec(tuple(_frequencies(layers[i], rotary, kind) for i, kind in enumerate(kinds)))


def _frequencies(attention: nn.Module, rotary: nn.Module, kind: str | None) -> Tensor:
    """The layer's frequencies, if moving its keys by them gives what the layer itself makes."""
    inv_freq = (getattr(rotary, f"{kind}_inv_freq") if kind else rotary.inv_freq).float()
    first, second = 3, 10
    keys, values = probe_cache(attention, rotary, torch.tensor([[first, second]]), kind)
    old, new = keys[:, :, :1], keys[:, :, 1:]
    change = (new - old).abs().max()
    fixed = torch.equal(values[:, :, :1], values[:, :, 1:])
    if change == 0 and fixed:
        return inv_freq[:0]
    error = (relocate_keys(old, torch.tensor([[second - first]]), inv_freq) - new).abs().max()
    # bfloat16 rounds by 0.4 % of a key, which changes by about itself; a wrong rotation is off
    # by about the change.
    if error <= 0.1 * change and fixed:
        return inv_freq
    raise ValueError(
        f"{type(attention).__name__} (layer {attention.layer_idx}) does not rotate its keys by "
        "halves as Llama does (adjacent pairs or latent keys?), so cached keys cannot be moved; "
        "use a model with half-split RoPE"
    )


def key_layers(model: nn.Module) -> dict[int, nn.Module]:
    """The attention modules that are handed rotary embeddings, by layer index."""
    found = {}
    for module in model.modules():
        takes = inspect.signature(module.forward).parameters
        attends = hasattr(module, "layer_idx") and hasattr(module, "scaling")
        if attends and {"position_embeddings", "past_key_values"} <= takes.keys():
            found[module.layer_idx] = module
    return found


class _Cached(Exception):
    """Carries keys and values out of a layer, before it attends."""


class _Tap:
    """Stands in for the layer's cache."""

    def update(self, keys: Tensor, values: Tensor, *args, **kwargs) -> None:
        raise _Cached(keys, values)


@torch.no_grad()
def probe_cache(
    attention: nn.Module, rotary: nn.Module, position: Tensor, kind: str | None = None
) -> tuple[Tensor, Tensor]:
    """Keys, rotated by the layer, and values of one random state at several positions.

    Args:
        attention: One of `key_layers`.
        rotary: The module that makes cos and sin.
        position: ``(1, S)``.
        kind: The layer's type, where ``rotary`` has several sets of frequencies.

    Returns:
        Each float32 ``(1, K, S, D)`` on the CPU.

    Raises:
        ValueError: If the layer does not hand keys to a cache.
    """
    weights = list(attention.parameters())
    # The codes of a quantised base are no dtype to compute in, and may be all there is.
    plain = [p.dtype for p in weights if p.is_floating_point() and p.element_size() > 1]
    dtype = plain[0] if plain else attention.config.dtype or torch.get_default_dtype()
    width = attention.config.get_text_config().hidden_size
    state = torch.randn(1, 1, width, generator=torch.Generator().manual_seed(0))
    state = state.expand(1, position.shape[1], -1).to(weights[0].device, dtype)
    angles = rotary(state, position.to(state.device), *([kind] if kind else []))
    try:
        with _evaluating(attention), gathered(*weights):
            options = {"attention_mask": None, "past_key_values": _Tap()}
            attention(hidden_states=state, position_embeddings=angles, **options)
    except _Cached as cached:
        keys, values = cached.args
        return keys.float().cpu(), values.float().cpu()
    except Exception as error:
        raise ValueError(f"{type(attention).__name__} hides its keys: {error}") from error
    raise ValueError(
        f"{type(attention).__name__} (layer {attention.layer_idx}) does not keep its own keys; "
        "blocktune caches the keys of every layer"
    )


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


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The model's decoder layers, through a PEFT wrapper or not.

    Raises:
        ValueError: If no list has as many layers as the config says.
    """
    depth = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if name.endswith("layers") and isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise ValueError(
        f"{type(model).__name__} has no list of {depth} decoder layers to hook into; "
        "blocktune serves decoders whose layers are in one list"
    )
