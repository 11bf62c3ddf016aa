"""Masks in the form that a kernel takes them in, and how many of them a plan may keep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from blocktune.attention.kernels import AttentionParams

KEPT_CELLS = 1 << 24
"""Mask elements that a plan keeps for all its layers (64 MiB in float32). Beyond them every layer
makes its masks again, a block of rows at a time, in forward and in backward."""


@dataclass
class MaskRoom:
    """What a plan may still keep of masks.

    Attributes:
        cells: Elements.
    """

    cells: int = KEPT_CELLS

    def take(self, cells: int) -> bool:
        """Whether ``cells`` more elements may be kept; if so, they are counted."""
        fits = cells <= self.cells
        self.cells -= cells if fits else 0
        return fits


class MaskForm(NamedTuple):
    """What a kernel takes as it is.

    Of any other mask it makes a copy, which autograd would keep for each layer.

    Attributes:
        dtype: Bool, or that of an additive mask.
        copies: Of the rows, below each other: query heads that are folded into rows.
        align: The distance between rows is a multiple of so many elements.
    """

    dtype: torch.dtype
    copies: int = 1
    align: int = 1


SEEN = MaskForm(torch.bool)
"""Whoever makes the scores itself takes a mask as the rule gives it."""


def mask_form(query: Tensor, key: Tensor, params: AttentionParams) -> MaskForm:
    """The form for `masked_attention` over ``query`` ``(G, H, R, D)``, ``key`` ``(G, K, N, D)``."""
    if params.softcap is not None:
        return SEEN
    if not query.is_cuda:
        return MaskForm(query.dtype)
    # The fused kernel on CUDA loads 16 bytes of a mask at once; 16 elements do for any dtype.
    return MaskForm(query.dtype, copies=query.shape[1] // key.shape[1], align=16)


def formed(seen: Tensor, form: MaskForm) -> Tensor:
    """Brings a bool mask ``(G, 1, R, N)``, True where visible, into a form.

    Returns:
        ``(G, 1, copies * R, N)``, in the form's dtype.
    """
    if form == SEEN:
        return seen
    groups, _, rows, keys = seen.shape
    wide = keys + -keys % form.align
    mask = seen.new_zeros((groups, form.copies, rows, wide), dtype=form.dtype)[..., :keys]
    mask.masked_fill_(~seen, float("-inf"))
    return mask.flatten(1, 2)[:, None]
