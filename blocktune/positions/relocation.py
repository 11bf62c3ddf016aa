"""How a model rotates its keys, and how cached keys are moved by one more rotation."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class RopeSpec(NamedTuple):
    """The rotary frequencies of a model; `blocktune.models.gate.require_supported` finds them.

    Attributes:
        inv_freq: For each layer, radians per position, float32 ``(R / 2,)`` where ``R <= D`` is
            the number of rotated dimensions (the first ones of the head); empty for a layer that
            does not rotate its keys.
    """

    inv_freq: tuple[Tensor, ...]


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


def relocate_keys(keys: Tensor, shift: Tensor, inv_freq: Tensor) -> Tensor:
    """Moves cached keys to new positions by composing one more rotation.

    Rotations add up, so a key stored at position ``p`` becomes the key for ``p + shift``
    without the hidden state it came from. Cos and sin have unit norm: a factor that the model
    multiplies into them (YaRN's ``attention_scaling``) is in the key already and must not
    enter twice. Always start from the stored original; repeated moves accumulate rounding.

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


def rotate_keys(keys: Tensor, rotation: Rotation, out: Tensor | None = None) -> Tensor:
    """Rotates keys; see `relocate_keys`.

    Args:
        keys: ``(B, K, S, D)``.
        rotation: Broadcastable to the rotated dimensions.
        out: Where the result goes, shaped like ``keys`` and no part of them; not differentiable.
    """
    cos, sin = rotation
    half = cos.shape[-1]
    left, right, passed = keys.split([half, half, keys.shape[-1] - 2 * half], dim=-1)
    if out is None:
        left, right = left.float(), right.float()
        moved = (left * cos - right * sin, right * cos + left * sin)
        return torch.cat((*(part.to(keys.dtype) for part in moved), passed), dim=-1)
    if keys.dtype != torch.float32:
        return out.copy_(rotate_keys(keys, rotation))
    first, second, rest = out.split([half, half, passed.shape[-1]], dim=-1)
    torch.mul(left, cos, out=first).addcmul_(right, sin, value=-1)
    torch.mul(right, cos, out=second).addcmul_(left, sin)
    rest.copy_(passed)
    return out
