"""Keys rotated while they are copied, in one pass over memory, on a CPU; needs numba.

Torch takes three passes. Results are the same, bit by bit, as long as torch has FMA instructions.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit, types
from numba.extending import intrinsic, overload
from torch import Tensor

from blocktune.positions.relocation import Rotation


@intrinsic
def _fma(context, one, two, three):
    """``one * two + three``, rounded once."""
    return one(one, two, three), lambda _, builder, __, args: builder.fma(*args)


def _turned(one, two, cos, sin, sign):
    """``one * cos + sign * two * sin``, rounded as torch does; for each type below."""


@overload(_turned, inline="always")
def _compiled(one, two, cos, sin, sign):
    if one == types.float32:  # addcmul
        return lambda one, two, cos, sin, sign: _fma(sign * two, sin, one * cos)

    def in_float32(one, two, cos, sin, sign):  # bfloat16, rounded to even
        bits = np.float32(_wide(one) * cos + sign * (_wide(two) * sin)).view(np.uint32)
        return np.uint16(np.uint32(bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)

    return in_float32


@njit(inline="always")
def _wide(bits):
    return np.uint32(np.uint32(bits) << 16).view(np.float32)


_FLAT = {name: types.Array(name, 1, "C") for name in (types.float32, types.uint16)}
_TURN = types.Array(types.float32, 2, "C")
_SIGNATURES = [types.void(kind, kind, *[types.int64] * 6, _TURN, _TURN) for kind in _FLAT.values()]


@njit(_SIGNATURES, cache=True, nogil=True, error_model="numpy")
def _rotate(keys, out, heads, rows, dim, key_step, out_step, start, cos, sin):
    half, each = cos.shape[1], int(cos.shape[0] > 1)
    plus, minus = np.float32(1), np.float32(-1)
    for head in range(heads):
        for row in range(rows):
            at, to, turn = head * key_step + row * dim, head * out_step + row * dim, row * each
            one, other = keys[at : at + dim], out[to : to + dim]
            c, s = cos[turn], sin[turn]
            for i in range(start):
                other[i] = one[i]
            for i in range(start + 2 * half, dim):
                other[i] = one[i]
            one, other = one[start:], other[start:]
            for i in range(half):
                left, right = one[i], one[i + half]
                other[i] = _turned(left, right, c[i], s[i], minus)
                other[i + half] = _turned(right, left, c[i], s[i], plus)


def rotate_into(keys: Tensor, rotation: Rotation, out: Tensor) -> bool:
    """Rotates keys ``(K, S, D)`` into ``out``; False, and nothing, if it does not know the form."""
    known = keys.dtype in (torch.float32, torch.bfloat16) and not rotation.interleaved
    plain = [one.ndim == 3 and one.stride()[1:] == (one.shape[2], 1) for one in (keys, out)]
    if not known or not all(plain) or keys.requires_grad or out.is_cuda:
        return False
    count, rows, dim = keys.shape
    steps = keys.stride(0), out.stride(0)
    cos, sin = (one[0].contiguous().numpy() for one in (rotation.cos, rotation.sin))
    flat = [_flat(one) for one in (keys, out)]
    _rotate(*flat, count, rows, dim, *steps, rotation.start, cos, sin)
    return True


def _flat(tensor: Tensor) -> np.ndarray:
    """The memory from its first to its last element."""
    span = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    flat = tensor.as_strided((span + 1,), (1,))
    return (flat if tensor.dtype == torch.float32 else flat.view(torch.uint16)).numpy()
