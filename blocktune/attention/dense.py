"""The reference: visibility as one N x N mask, for tests, `blocktune check` and small inputs."""

from __future__ import annotations

from torch import Tensor

from blocktune.attention.kernels import check_rows, plain_attention
from blocktune.layout import FIRST_LAYER, LayerRule, Layout, visible


def dense_mask(layout: Layout, rule: LayerRule = FIRST_LAYER) -> Tensor:
    """Visibility of every row for every row.

    Args:
        layout: Rows ``(B, S)``.
        rule: Which layer it is and how far its window reaches.

    Returns:
        Bool ``(B, 1, S, S)``, True where the row (third axis) sees the key (last axis). Stock
        models take it as a 4-D ``attention_mask`` with ``sdpa``; for ``eager`` it must be made
        additive, since a bool mask is silently added there.
    """
    query = layout.rows().map(lambda field: field[:, None, :, None])
    key = layout.rows().map(lambda field: field[:, None, None, :])
    return visible(query, key, layout.superseded_until[:, None, None, :], rule)


class DensePlan:
    """Attention by the dense mask, in float32, layer by layer."""

    def __init__(self, layout: Layout):
        """Keeps ``layout``; a mask is made for each layer and not kept."""
        self.layout = layout

    def attend(self, query, key, value, rule, params) -> Tensor:
        """Implements `Plan.attend`."""
        check_rows(self.layout.kind.shape, query, key)
        out = plain_attention(query, key, value, dense_mask(self.layout, rule), params)
        return out.transpose(1, 2)
