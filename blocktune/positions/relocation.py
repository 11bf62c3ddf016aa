"""How a model rotates its keys, and how cached keys are moved by one more rotation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from blocktune.models.gate import key_layers, probe_cache

FIXED_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""RoPE types whose frequencies do not depend on the length of the prompt."""


@dataclass(frozen=True)
class RopeSpec:
    """The rotary frequencies of a model, layer by layer.

    Attributes:
        inv_freq: Per layer, radians per position, float32 ``(R / 2,)`` where ``R <= D`` is the
            number of rotated dimensions (the first ones of the head); empty in a layer that
            does not rotate its keys.
    """

    inv_freq: tuple[Tensor, ...]

    @classmethod
    def from_model(cls, model: PreTrainedModel) -> RopeSpec:
        """Reads the frequencies that the model itself rotates with, and tries them on its keys.

        Every layer's own key of one random state at two positions is compared with the moved
        one (two tokens through each key projection), so that a model which rotates otherwise
        (adjacent pairs as Cohere and GLM, latent keys) cannot be served silently wrong.

        Raises:
            ValueError: If the model has no rotary embedding, one whose frequencies depend on
                the prompt's length (dynamic, longrope), or one that `relocate_keys` does not
                reproduce: a rotated key cannot be moved then.
        """
        config = model.config.get_text_config()
        rotary = _find_rotary(model)
        if rotary is None:
            raise ValueError(
                f"{type(model).__name__} has no rotary position embedding; blocktune moves "
                "cached chunks by rotating their keys and needs a RoPE model"
            )
        kinds: list[str | None] = [None] * config.num_hidden_layers
        if isinstance(rotary.rope_type, dict):  # Gemma 3: one set of frequencies a layer type
            kinds = config.layer_types
        for kind in set(kinds):
            _require_fixed(rotary.rope_type[kind] if kind else rotary.rope_type, model)
        layers = key_layers(model)
        if sorted(layers) != list(range(len(kinds))):
            raise ValueError(
                f"{type(model).__name__} has {len(kinds)} layers, of which {len(layers)} make "
                "keys from rotary embeddings; blocktune needs a decoder whose layers all do"
            )
        return cls(tuple(_frequencies(layers[i], rotary, kinds[i]) for i in range(len(kinds))))


def _find_rotary(model: nn.Module) -> nn.Module | None:
    """The module that makes cos and sin for all layers; the text model's when there are more."""
    return next((m for name, m in model.named_modules() if name.endswith("rotary_emb")), None)


def _require_fixed(rope_type: str, model: PreTrainedModel) -> None:
    if rope_type not in FIXED_ROPE_TYPES:
        raise ValueError(
            f"{type(model).__name__} uses RoPE type '{rope_type}', whose frequencies change with "
            f"the prompt's length, so a rotated key cannot be moved; supported: "
            f"{', '.join(FIXED_ROPE_TYPES)} (set rope_parameters in the config if one of them fits)"
        )


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
        "blocktune supports half-split RoPE"
    )


def relocate_keys(keys: Tensor, shift: Tensor, inv_freq: Tensor) -> Tensor:
    """Moves cached keys to new positions by composing one more rotation.

    Rotations add up, so a key stored at position ``p`` becomes the key for ``p + shift``
    without the hidden state it came from. Cos and sin have unit norm: a factor that the model
    multiplies into them (YaRN's ``attention_scaling``) is in the key already and must not
    enter twice. Always start from the stored original; repeated moves pile up rounding.

    Args:
        keys: Rotated keys, ``(B, K, S, D)``, any floating dtype.
        shift: Signed distance to move each token, in positions, ``(B, S)``.
        inv_freq: The layer's frequencies, radians per position, ``(R / 2,)``, ``R <= D``; the
            dimensions after the first ``R`` are not rotated (partial rotary).

    Returns:
        Keys at the new positions, same shape and dtype. Computed in float32: bfloat16 cannot
        hold integers past 256, so position 257 would read as 256.

    Raises:
        ValueError: If ``shift`` does not match the keys.

    Source: Block-Attention, arXiv:2409.15355, position re-encoding (one rotation, not two).
    """
    if shift.shape != (keys.shape[0], keys.shape[2]):
        raise ValueError(
            f"shift must be (batch, tokens) = {(keys.shape[0], keys.shape[2])} to match keys, "
            f"got {tuple(shift.shape)}"
        )
    return rotate_keys(keys, Rotation.of(shift.to(keys.device), inv_freq))


class Rotation(NamedTuple):
    """The rotation that moves each token, the same for all heads.

    Attributes:
        cos: ``(..., S, R / 2)`` float32, of unit norm with ``sin``.
        sin: Likewise.
    """

    cos: Tensor
    sin: Tensor

    @classmethod
    def of(cls, shift: Tensor, inv_freq: Tensor) -> Rotation:
        """By ``shift`` ``(B, S)`` positions; cos and sin have axes ``(B, 1, S, R / 2)``."""
        angle = shift[:, None, :, None].float() * inv_freq.to(shift.device).float()
        return cls(angle.cos(), angle.sin())

    def cut(self, rows: slice) -> Rotation:
        """Of some of the tokens."""
        return Rotation(self.cos[..., rows, :], self.sin[..., rows, :])


def rotate_keys(keys: Tensor, turn: Rotation, out: Tensor | None = None) -> Tensor:
    """Rotates keys; see `relocate_keys`.

    Args:
        keys: ``(B, K, S, D)``.
        turn: Broadcastable to the rotated dimensions.
        out: Where the result goes, shaped like ``keys`` and no part of them; not differentiable.
    """
    half = turn.cos.shape[-1]
    left, right, passed = keys.split([half, half, keys.shape[-1] - 2 * half], dim=-1)
    if out is None:
        left, right = left.float(), right.float()
        moved = (left * turn.cos - right * turn.sin, right * turn.cos + left * turn.sin)
        return torch.cat((*(part.to(keys.dtype) for part in moved), passed), dim=-1)
    if keys.dtype != torch.float32:
        return out.copy_(rotate_keys(keys, turn))
    first, second, rest = out.split([half, half, passed.shape[-1]], dim=-1)
    torch.mul(left, turn.cos, out=first).addcmul_(right, turn.sin, value=-1)
    torch.mul(right, turn.cos, out=second).addcmul_(left, turn.sin)
    rest.copy_(passed)
    return out
