"""Attention over given tensors: a causal square, or any rows under any mask.

The only place that calls a kernel. Both functions honour soft-capping, which PyTorch's fused
kernel does not know, and share K/V heads among query heads without copying K/V.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


class Knobs(NamedTuple):
    """What a model's layer asks of attention besides q, k and v.

    Attributes:
        scaling: Factor on the scores, usually ``D ** -0.5``.
        softcap: Gemma 2's bound on the scores, ``softcap * tanh(score / softcap)``, or None.
        dropout: Probability of dropping an attention weight; 0 in evaluation.
    """

    scaling: float
    softcap: float | None = None
    dropout: float = 0.0


def check_rows(shape: torch.Size, query: Tensor, key: Tensor) -> None:
    """Requires q and k to have the rows of the layout that a plan was made for.

    Raises:
        ValueError: If they do not.
    """
    batch, rows = query.shape[0], query.shape[2]
    if (batch, rows) != tuple(shape) or key.shape[2] != rows:
        raise ValueError(
            f"the plan was made for {tuple(shape)} (batch, rows); attention got {(batch, rows)} "
            f"query and {key.shape[2]} key rows; make a plan of this input's own layout"
        )


def causal_attention(query: Tensor, key: Tensor, value: Tensor, knobs: Knobs) -> Tensor:
    """Row ``i`` attends to rows ``0..i``.

    Args:
        query: ``(G, H, M, D)``.
        key: ``(G, K, M, D)`` with ``H`` a multiple of ``K``.
        value: ``(G, K, M, D)``.
        knobs: Scaling, soft-capping and dropout.

    Returns:
        ``(G, H, M, D)``. Nothing of size M x M is kept, except where soft-capping needs the
        scores, and there one block of rows at a time.
    """
    if knobs.softcap is None:
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            is_causal=True,
            scale=knobs.scaling,
            dropout_p=knobs.dropout,
            enable_gqa=query.shape[1] != key.shape[1],
        )
    size = query.shape[2]
    blocks = []
    for start in range(0, size, ROW_BLOCK):
        stop = min(start + ROW_BLOCK, size)
        row = torch.arange(start, stop, device=query.device)[:, None]
        mask = torch.arange(stop, device=query.device) <= row
        rows = query[:, :, start:stop]
        blocks.append(masked_attention(rows, key[:, :, :stop], value[:, :, :stop], mask, knobs))
    return torch.cat(blocks, dim=2)


ROW_BLOCK = 512
"""Rows attended at a time where a mask is needed: bounds what is in memory at once."""


def masked_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, knobs: Knobs
) -> Tensor:
    """Rows attend to the keys that ``mask`` shows them.

    Args:
        query: ``(G, H, R, D)``.
        key: ``(G, K, N, D)``.
        value: ``(G, K, N, D)``.
        mask: Broadcastable to ``(G, 1, R, N)``. Bool, True where visible, or (without
            soft-capping) additive in the dtype of ``query``. No row may be without a visible
            key.
        knobs: Scaling, soft-capping and dropout.

    Returns:
        ``(G, H, R, D)``.
    """
    if knobs.softcap is not None:
        if torch.is_grad_enabled() and query.requires_grad:
            # Scores are recomputed in backward: kept, they would be rows x keys x heads.
            return checkpoint(plain_attention, query, key, value, mask, knobs, use_reentrant=False)
        return plain_attention(query, key, value, mask, knobs)
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        scale=knobs.scaling,
        dropout_p=knobs.dropout,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def plain_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, knobs: Knobs
) -> Tensor:
    """Plain attention in float32 with capped scores; K/V heads are broadcast, not copied."""
    groups, heads, rows, dim = query.shape
    shared = query.view(groups, key.shape[1], -1, rows, dim).float()
    scores = shared @ key.float().transpose(-1, -2)[:, :, None] * knobs.scaling
    if knobs.softcap is not None:
        scores = torch.tanh(scores / knobs.softcap) * knobs.softcap
    mask = mask.expand(groups, 1, rows, key.shape[2])[:, :, None]
    scores = scores.masked_fill(~mask, float("-inf"))
    # A row that sees nothing (padding) would be NaN; it is nobody's key, so zeros do.
    weights = torch.softmax(scores, dim=-1).masked_fill(~mask, 0.0)
    weights = F.dropout(weights, knobs.dropout)
    return (weights @ value.float()[:, :, None]).to(query.dtype).reshape(groups, heads, rows, -1)
