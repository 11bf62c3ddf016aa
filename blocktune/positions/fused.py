"""Rotates keys while copying them, in one pass over memory, on a CPU; needs numba.

Torch needs three passes. Results are bitwise equal if torch uses FMA instructions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numba import njit, types
from numba.extending import intrinsic, overload
from torch import Tensor

if TYPE_CHECKING:
    from blocktune.positions.relocation import Rotation


@intrinsic
def _fma(context, a, b, c):
    """``a * b + c``, rounded once."""
    return a(a, b, c), lambda _, builder, __, args: builder.fma(*args)


def _rotated(x, y, cos, sin, sign):
    """``x * cos + sign * y * sin``, rounded as torch does; compiled for each dtype below."""


@overload(_rotated, inline="always")
def _compiled(x, y, cos, sin, sign):
    if x == types.float32:  # like torch's addcmul
        return lambda x, y, cos, sin, sign: _fma(sign * y, sin, x * cos)

    def in_float32(x, y, cos, sin, sign):  # bfloat16 bits, rounded to even
        bits = np.float32(_wide(x) * cos + sign * (_wide(y) * sin)).view(np.uint32)
        return np.uint16(np.uint32(bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)

    return in_float32


@njit(inline="always")
def _wide(bits):
    return np.uint32(np.uint32(bits) << 16).view(np.float32)


_FLAT = {torch.float32: torch.float32, torch.bfloat16: torch.uint16}
_TURN = types.Array(types.float32, 3, "C")
_SIGNATURES = [
    types.void(flat, flat, *[types.int64] * 6, _TURN, _TURN)
    for flat in (types.Array(kind, 1, "C") for kind in (types.float32, types.uint16))
]


@njit(_SIGNATURES, cache=True, nogil=True, error_model="numpy")
def _rotate(keys, out, heads, rows, dim, key_step, out_step, start, cos, sin):
    half, each = cos.shape[2], int(cos.shape[1] > 1)
    plus, minus = np.float32(1), np.float32(-1)
    for head in range(heads):
        for row in range(rows):
            at, to, turn = head * key_step + row * dim, head * out_step + row * dim, row * each
            source, target = keys[at : at + dim], out[to : to + dim]
            c, s = cos[0, turn], sin[0, turn]
            for i in range(start):
                target[i] = source[i]
            for i in range(start + 2 * half, dim):
                target[i] = source[i]
            source, target = source[start:], target[start:]
            for i in range(half):
                left, right = source[i], source[i + half]
                target[i] = _rotated(left, right, c[i], s[i], minus)
                target[i + half] = _rotated(right, left, c[i], s[i], plus)


def rotate_into(keys: Tensor, rotation: Rotation, out: Tensor) -> bool:
    """Rotates keys ``(K, S, D)`` into ``out``. Returns False if it does not support the inputs."""
    if keys.dtype not in _FLAT or keys.ndim != 3 or rotation.interleaved or keys.requires_grad:
        return False
    (heads, rows, dim), step, out_step = keys.shape, keys.stride(), out.stride()
    if step[1:] != (dim, 1) or out_step[1:] != (dim, 1) or out.is_cuda:
        return False
    cos, sin = rotation.cos.contiguous().numpy(), rotation.sin.contiguous().numpy()
    flat = [
        t.as_strided(((heads - 1) * first + rows * dim,), (1,)).view(_FLAT[keys.dtype]).numpy()
        for t, first in ((keys, step[0]), (out, out_step[0]))
    ]
    _rotate(*flat, heads, rows, dim, step[0], out_step[0], rotation.start, cos, sin)
    return True
