"""RoPE of a model, and relocation of cached keys to new positions by one more rotation."""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

_LOG = logging.getLogger(__name__)


class LayerRope(NamedTuple):
    """How one layer rotates its keys."""

    inv_freq: Tensor  # radians per position of each pair, float32 (P,); may be empty
    start: int = 0  # first of the 2 P rotated dimensions of a head
    interleaved: bool = False  # pairs are neighbours (GPT-J, Cohere), not halves (Llama)
    in_values: bool = False  # the rotated part is cached as values (DeepSeek's latents)

    def of_keys(self, dim: int) -> LayerRope:
        """The rotation of keys of ``dim`` dimensions, as attention sees them."""
        start = dim - 2 * len(self.inv_freq) if self.in_values else self.start
        return self._replace(start=start, in_values=False)


class RopeSpec(NamedTuple):
    """How a model rotates its keys; returned by `blocktune.models.gate.require_supported`."""

    layers: tuple[LayerRope, ...]  # one for each layer
    max_tokens: int | None = None  # length up to which moving keys is exact, if limited


class Rotation(NamedTuple):
    """The rotation of each token, the same for all heads."""

    cos: Tensor  # ``(..., S, P)`` float32; cos ** 2 + sin ** 2 = 1
    sin: Tensor  # ``(..., S, P)`` float32
    start: int = 0  # as in `LayerRope`
    interleaved: bool = False  # as in `LayerRope`

    @classmethod
    def of(cls, shift: Tensor, rope: LayerRope) -> Rotation:
        """The rotation by ``shift`` ``(B, S)`` positions; cos and sin are ``(B, 1, S, P)``."""
        angle = shift[:, None, :, None].float() * rope.inv_freq.to(shift.device).float()
        return cls(angle.cos(), angle.sin(), rope.start, rope.interleaved)

    def pairs(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Views of the first and the second dimension of each rotated pair, ``(..., S, P)``."""
        count = self.cos.shape[-1]
        rotated = keys.narrow(-1, self.start, 2 * count)
        if self.interleaved:
            return rotated[..., 0::2], rotated[..., 1::2]
        return rotated[..., :count], rotated[..., count:]


def relocate_keys(keys: Tensor, shift: Tensor, rope: LayerRope) -> Tensor:
    """Moves rotated keys ``(B, K, S, D)`` by ``shift`` ``(B, S)`` positions, by one more rotation.

    Rotations add up, so a key stored at position ``p`` becomes the key for ``p + shift``
    without the hidden state it came from. A factor that the model multiplies into cos and sin
    (YaRN's ``attention_scaling``) is in the key already, and must not be applied again. Always
    start from the stored original, because repeated moves accumulate rounding errors.

    Returns keys of the same shape and dtype, computed in float32: bfloat16 cannot hold integers
    past 256. Raises ValueError if ``shift`` does not match the keys.

    Source: Block-Attention, arXiv:2409.15355, position re-encoding (one rotation, not two).
    """
    if shift.shape != (keys.shape[0], keys.shape[2]):
        raise ValueError(
            f"shift must be (batch, tokens) = {(keys.shape[0], keys.shape[2])} to match keys, "
            f"got {tuple(shift.shape)}"
        )
    return rotate_keys(keys, Rotation.of(shift.to(keys.device), rope))


def rotate_keys(keys: Tensor, rotation: Rotation, out: Tensor | None = None) -> Tensor:
    """Rotates keys ``(B, K, S, D)``; see `relocate_keys`.

    If ``out`` of the keys' shape is given, which must not overlap them, the result is written
    there and is not differentiable.
    """
    if out is not None and _fused is not None and _fused(keys, rotation, out):
        return out
    cos, sin = rotation.cos, rotation.sin
    result = keys.clone() if out is None else out
    (left, right), (first, second) = rotation.pairs(keys), rotation.pairs(result)
    if out is not None and 2 * cos.shape[-1] < keys.shape[-1]:
        out.copy_(keys)  # for the dimensions that are not rotated
    if out is not None and keys.dtype == torch.float32:
        torch.mul(left, cos, out=first)
        first.addcmul_(right, sin, value=-1)
        torch.mul(right, cos, out=second)
        second.addcmul_(left, sin)
        return out
    left, right = left.float(), right.float()
    first.copy_(left * cos - right * sin)
    second.copy_(right * cos + left * sin)
    return result


_fused: Callable[[Tensor, Rotation, Tensor], bool] | None = None


def load_fused() -> None:
    """Makes `rotate_keys` use numba on CPUs, if it is installed; compiles once, for seconds."""
    global _fused
    if getattr(find_spec("vllm"), "origin", None):  # vLLM 0.32 fails in a process with numba
        return
    try:
        _fused = import_module("blocktune.positions.fused").rotate_into
    except (ImportError, RuntimeError) as error:  # no numba, or no place for its compiled code
        _LOG.info("keys are rotated by torch: %s", error)
