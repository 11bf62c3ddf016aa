"""Attention kernels over plain tensors, causal or under any mask; no other module calls kernels.

They apply soft-capping and attention sinks, and share K/V heads without copying K/V.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Mask = Tensor | Callable[[], Tensor] | None
"""A mask, or a function that makes it in forward and again in backward, so that it is not kept."""


class AttentionParams(NamedTuple):
    """Parameters that a layer passes to attention besides q, k and v."""

    scaling: float  # factor on the scores, usually ``D ** -0.5``
    softcap: float | None = None  # Gemma 2's bound: ``softcap * tanh(score / softcap)``
    dropout: float = 0.0  # probability of dropping an attention weight; 0 in evaluation
    sinks: Tensor | None = None  # GPT-OSS, ``(H,)``: an extra logit per head, without a value

    @property
    def is_plain(self) -> bool:
        """Whether PyTorch's fused kernel supports these parameters."""
        return self.softcap is None and self.sinks is None


def check_rows(shape: torch.Size, query: Tensor, key: Tensor) -> None:
    """Raises ValueError if q and k do not have the rows of the plan's layout, ``shape``."""
    batch, rows = query.shape[0], query.shape[2]
    if (batch, rows) != tuple(shape) or key.shape[2] != rows:
        raise ValueError(
            f"the plan was made for {tuple(shape)} (batch, rows); attention got {(batch, rows)} "
            f"query and {key.shape[2]} key rows; make a plan for the layout of this input"
        )


def causal_attention(query: Tensor, key: Tensor, value: Tensor, params: AttentionParams) -> Tensor:
    """`masked_attention` where row ``i`` attends to rows ``0..i``, without tensors of N x N."""
    if params.is_plain:
        if query.is_cuda and query.dtype == torch.float32:
            # The fused kernel for float32 on CUDA cannot share heads.
            shared = query.shape[1] // key.shape[1]
            key, value = (states.repeat_interleave(shared, dim=1) for states in (key, value))
        return _fused(query, key, value, params, is_causal=True)
    blocks, stop = [], 0
    for rows in query.split(ROW_BLOCK, dim=2):
        start, stop = stop, stop + rows.shape[2]
        mask = partial(_causal_mask, start, stop, query.device)
        blocks.append(masked_attention(rows, key[:, :, :stop], value[:, :, :stop], mask, params))
    return torch.cat(blocks, dim=2)


def _causal_mask(start: int, stop: int, device: torch.device) -> Tensor:
    return torch.ones(stop - start, stop, dtype=torch.bool, device=device).tril(start)


def tail_attention(query: Tensor, key: Tensor, value: Tensor, params: AttentionParams) -> Tensor:
    """Causal attention of the last ``R`` of ``N`` rows; shapes as in `masked_attention`."""
    rows, missing = query.shape[2], key.shape[2] - query.shape[2]
    if rows == 1:
        return masked_attention(query, key, value, None, params)
    # PyTorch aligns the first row with the first key.
    padded = F.pad(query, (0, 0, missing, 0))
    return causal_attention(padded, key, value, params)[:, :, missing:]


ROW_BLOCK = 512  # rows per block where a mask is needed; it bounds the memory in use


def masked_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Mask, params: AttentionParams
) -> Tensor:
    """Attention of rows ``(G, H, R, D)`` to the keys ``(G, K, N, D)`` visible under ``mask``.

    The mask is broadcastable to ``(G, 1, R, N)``: bool, True where visible, or (without
    soft-capping and sinks) additive in the dtype of ``query``, ideally of the form `mask_form`.
    Every row must have a visible key. None: all rows see all keys.
    """
    has_gradient = any(states.requires_grad for states in (query, key, value))
    # Checkpoint, or autograd would keep the scores for backward: rows x keys x heads.
    if has_gradient and torch.is_grad_enabled() and (callable(mask) or not params.is_plain):
        options = {"use_reentrant": False, "preserve_rng_state": params.dropout > 0}
        return checkpoint(_by_kernel, query, key, value, mask, params, **options)
    return _by_kernel(query, key, value, mask, params)


def _by_kernel(
    query: Tensor, key: Tensor, value: Tensor, mask: Mask, params: AttentionParams
) -> Tensor:
    mask = mask() if callable(mask) else mask
    if not params.is_plain:
        return plain_attention(query, key, value, mask, params)
    if query.is_cuda:
        return folded_attention(query, key, value, mask, params)
    return _fused(query, key, value, params, attn_mask=mask)


def _fused(query: Tensor, key: Tensor, value: Tensor, params: AttentionParams, **mask) -> Tensor:
    if _trains_in_bfloat16(query, key) and not params.dropout:
        return _by_products(query, key, value, params, **mask)
    options = {"scale": params.scaling, "dropout_p": params.dropout}
    options["enable_gqa"] = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, **mask, **options)


FEW_SCORES = 1 << 23  # most scores of a call that are kept for backward, 6 bytes each


def _trains_in_bfloat16(query: Tensor, key: Tensor) -> bool:
    """Whether to train without PyTorch's fused kernel, which does not use a CPU's bfloat16."""
    if query.device.type != "cpu" or not (torch.is_grad_enabled() and query.requires_grad):
        return False
    autocast = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if autocast else query.dtype
    return dtype == torch.bfloat16 and query.shape[:-1].numel() * key.shape[2] <= FEW_SCORES


def _by_products(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    params: AttentionParams,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """`_fused` by matrix products in the dtype of the inputs; the softmax is in float32."""
    if is_causal:
        attn_mask = _causal_mask(0, query.shape[2], query.device)
    weights = torch.softmax(_scores(query, key, attn_mask, params), dim=-1)
    return weighted_values(weights.to(value.dtype), value)


def folded_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, params: AttentionParams
) -> Tensor:
    """The fused kernel under a mask, with the query heads of one K/V head stacked as rows.

    On CUDA no fused kernel supports both a mask and ``enable_gqa``: PyTorch would copy K/V and keep
    all scores. As `masked_attention`, but for soft-capping and sinks; the mask may be folded.
    """
    groups, heads, rows, dim = query.shape
    shared = heads // key.shape[1]
    if shared > 1:
        query = query.reshape(groups, key.shape[1], shared * rows, dim)
        if mask is not None and mask.shape[-2] != shared * rows:
            mask = mask.expand(groups, 1, rows, key.shape[2]).repeat(1, 1, shared, 1)
    out = _fused(query, key, value, params, attn_mask=mask)
    return out.reshape(groups, heads, rows, -1)


def plain_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, params: AttentionParams
) -> Tensor:
    """Attention in float32 with soft-capping and sinks; K/V heads are broadcast, not copied."""
    scores = plain_scores(query, key, mask, params)
    # A row that sees no key (padding) would be NaN. Its output is never used, so it may be 0.
    weights = attention_weights(scores, params).masked_fill(scores == float("-inf"), 0.0)
    return weighted_values(F.dropout(weights, params.dropout), value.float()).to(query.dtype)


def plain_scores(
    query: Tensor, key: Tensor, mask: Tensor | None, params: AttentionParams
) -> Tensor:
    """Scores before softmax, ``(G, H, R, N)`` float32: scaled, capped, and -inf where hidden."""
    return _scores(query.float(), key.float(), mask, params)


def _scores(query: Tensor, key: Tensor, mask: Tensor | None, params: AttentionParams) -> Tensor:
    """`plain_scores` by a product in the dtype of the inputs."""
    groups, heads, rows, dim = query.shape
    shared = query.reshape(groups, key.shape[1], -1, dim)
    scores = (shared @ key.transpose(-1, -2)).float().view(groups, heads, rows, -1) * params.scaling
    if params.softcap is not None:
        scores = torch.tanh(scores / params.softcap) * params.softcap
    if mask is None:
        return scores
    is_bool = mask.dtype == torch.bool
    return scores.masked_fill(~mask, float("-inf")) if is_bool else scores + mask


def attention_weights(scores: Tensor, params: AttentionParams) -> Tensor:
    """Softmax of scores ``(G, H, R, N)``. With sinks, the weights of a row sum to less than 1."""
    if params.sinks is None:
        return torch.softmax(scores, dim=-1)
    sinks = params.sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    return torch.softmax(torch.cat([scores, sinks], dim=-1), dim=-1)[..., :-1]


def weighted_values(weights: Tensor, value: Tensor) -> Tensor:
    """Averages values ``(G, K, N, D)`` by ``(G, H, R, N)``; returns ``(G, H, R, D)``."""
    groups, heads, rows, keys = weights.shape
    shared = weights.reshape(groups, value.shape[1], -1, keys)
    return (shared @ value).view(groups, heads, rows, -1)
