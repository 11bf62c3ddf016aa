"""The visibility rule as a FlexAttention ``BlockMask``, built from block summaries.

``create_block_mask`` would evaluate N x N cells. Here the fields' ranges in blocks of 128 rows
select the pairs of blocks that the kernel visits; inside them it applies the exact rule.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from blocktune.attention.kernels import check_rows
from blocktune.layout import FIRST_LAYER, GLOBAL, LayerRule, Layout, visible

BLOCK = 128


class _Range(NamedTuple):
    """Smallest and largest value of a field in each block without padding, ``(B, blocks)``."""

    low: Tensor
    high: Tensor

    def meets(self, other: _Range) -> Tensor:
        """Whether the ranges of two blocks overlap, ``(B, query blocks, key blocks)``."""
        return (self.low[:, :, None] <= other.high[:, None]) & (
            other.low[:, None] <= self.high[:, :, None]
        )


def _range(field: Tensor, keep: Tensor) -> _Range:
    pad = -field.shape[1] % BLOCK
    huge = 1 << 40  # above any order, far from overflow, and exact as a float, which F.pad takes
    low = F.pad(field.masked_fill(~keep, huge), (0, pad), value=huge)
    high = F.pad(field.masked_fill(~keep, -huge), (0, pad), value=-huge)
    return _Range(low.unflatten(1, (-1, BLOCK)).amin(-1), high.unflatten(1, (-1, BLOCK)).amax(-1))


def block_pairs(layout: Layout, rule: LayerRule) -> Tensor:
    """Pairs of 128-row blocks that may contain a visible cell, bool ``(B, blocks, blocks)``."""
    alive = ~layout.is_pad & (layout.until > rule.layer)
    local = alive & (layout.group != GLOBAL)
    order, sample = _range(layout.order, alive), _range(layout.sample, alive)
    group = _range(layout.group, local)
    has_global = _range((layout.group == GLOBAL).long(), alive).high == 1
    pairs = sample.meets(sample) & (order.low[:, None] <= order.high[:, :, None])
    if rule.window is not None:
        nearest = order.low[:, :, None] - order.high[:, None]
        pairs &= nearest < rule.window
    return pairs & (has_global[:, :, None] | group.meets(group))


def flex_block_mask(layout: Layout, rule: LayerRule = FIRST_LAYER) -> BlockMask:
    """Makes a ``BlockMask`` of 128 x 128 blocks, with the exact rule as its ``mask_mod``."""
    rows, superseded = layout.rows(), layout.superseded_until

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return visible(
            rows.map(lambda field: field[batch, query]),
            rows.map(lambda field: field[batch, key]),
            superseded[batch, key],
            rule,
        )

    pairs = block_pairs(layout, rule)[:, None]
    counts = pairs.sum(-1, dtype=torch.int32)
    columns = torch.argsort(pairs.int(), dim=-1, descending=True, stable=True).to(torch.int32)
    size = (layout.num_rows, layout.num_rows)
    return BlockMask.from_kv_blocks(
        counts, columns, BLOCK_SIZE=BLOCK, mask_mod=mask_mod, seq_lengths=size
    )


@functools.cache
def _compiled():
    return torch.compile(flex_attention, dynamic=False)


def _flex(*args, **kwargs):
    # Beyond PyTorch's limit of 8 lengths it would run without its kernel, on N x N scores.
    limits = {"recompile_limit": 256, "fail_on_recompile_limit_hit": True}
    with torch._dynamo.config.patch(**limits):
        return _compiled()(*args, **kwargs)


class FlexPlan:
    """FlexAttention: one kernel over the visible blocks, on CUDA, or on CPUs (forward only)."""

    def __init__(self, layout: Layout):
        self.layout, self.written = layout, layout.written
        self._endings = layout.endings
        self._masks: dict[LayerRule, BlockMask] = {}  # for layers with the same rule

    def attend(self, query, key, value, rule, params) -> Tensor:
        """Implements `Plan.attend`. ValueError for attention dropout, or gradients on a CPU."""
        check_rows(self.layout.kind.shape, query, key)
        if params.dropout:
            raise ValueError(
                f"FlexAttention has no dropout, the model sets {params.dropout}; set "
                "attention_dropout to 0 or use attention_execution: split"
            )
        if not query.is_cuda and torch.is_grad_enabled() and query.requires_grad:
            raise ValueError(
                "FlexAttention has no backward on a CPU; use attention_execution: split"
            )
        rule = rule.first_alike(self._endings)
        if rule not in self._masks:
            self._masks[rule] = flex_block_mask(self.layout, rule)
        attention = _flex if query.is_cuda else flex_attention
        out, aux = attention(
            query,
            key,
            value,
            score_mod=_softcap(params.softcap),
            block_mask=self._masks[rule],
            scale=params.scaling,
            enable_gqa=query.shape[1] != key.shape[1],
            return_aux=AuxRequest(lse=params.sinks is not None),
        )
        if params.sinks is not None:  # add the sink to the softmax denominator
            sinks = params.sinks.float()[:, None]
            out = out * torch.sigmoid(aux.lse - sinks)[..., None].to(out.dtype)
        return out.transpose(1, 2)


def _softcap(bound: float | None):
    if bound is None:
        return None

    def score_mod(score, batch, head, query, key):
        return torch.tanh(score / bound) * bound

    return score_mod
