"""How much attention rows pay to each chunk, summed up while a forward pass runs."""

from __future__ import annotations

import torch
from torch import Tensor

from blocktune.attention.kernels import Knobs, plain_scores
from blocktune.engine.watching import blocks, mask_of
from blocktune.layout import GLOBAL, Kind, LayerRule, Rows


class ChunkMass:
    """Reads the weights of the question's rows, and of chunks that no cache held.

    Attributes:
        mass: Attention weight that each column's row pays each chunk, mean over heads, summed over
            the layers read, ``(B, N, C)`` float32; zero for rows that are not read.
        layers: Layers read.
        multiply_adds: Of making the weights once more, per prompt, ``(B,)``.
    """

    def __init__(self, columns: Rows):
        """Prepares for a pass over ``columns`` ``(B, N)``."""
        self.columns = columns
        chunks = torch.arange(int(columns.chunk.max()) + 1, device=columns.chunk.device)
        is_chunk = columns.kind == Kind.CHUNK
        self.member = (is_chunk[..., None] & (columns.chunk[..., None] == chunks)).float()
        self.mass = torch.zeros_like(self.member)
        self.layers = 0
        self.multiply_adds = torch.zeros(len(columns.kind), dtype=torch.int64)

    def read(self, rows: Rows, query: Tensor, key: Tensor, rule: LayerRule, knobs: Knobs) -> None:
        """Adds one layer's weights.

        Args:
            rows: Facts of the computed rows, ``(B, R)``; a row's order is its column.
            query: ``(B, H, R, D)``.
            key: Of all columns, ``(B, K, N, D)``.
            rule: The layer's part of the rule.
            knobs: Scaling and soft-capping.
        """
        column = rows.order.clamp(min=0)
        uncached = self.columns.group.gather(1, column) == GLOBAL
        wanted = (rows.kind == Kind.QUERY) | ((rows.kind == Kind.CHUNK) & uncached)
        for block in blocks(wanted):
            mask = mask_of(rows, self.columns, block, LayerRule(window=rule.window))
            scores = plain_scores(query[:, :, block], key, mask[:, None], knobs)
            paid = torch.softmax(scores, dim=-1).mean(1) @ self.member
            paid = torch.where(wanted[:, block, None], paid, 0.0)
            index = column[:, block, None].expand_as(paid)
            self.mass.scatter_add_(1, index, paid)
        self.layers += 1
        macs = query.shape[1] * query.shape[3] * key.shape[2]
        self.multiply_adds += (wanted.sum(1) * macs).cpu()

    def of_question(self) -> Tensor:
        """What the question's rows paid each chunk in the layers read, ``(B, C)``."""
        asks = self.columns.kind == Kind.QUERY
        return torch.where(asks[..., None], self.mass, 0.0).sum(1)
