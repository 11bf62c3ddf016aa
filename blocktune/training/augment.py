"""Variations of a layout from epoch to epoch: who sees whom, and at which positions.

(Chunk order, chunk count and distractors change the text: `blocktune.data.augment`.)
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import torch

from blocktune.layout import GLOBAL, NO_CHUNK, Kind, Layout


def draw_of(seed: int, epoch: int, *keys: object) -> random.Random:
    """A generator for one example in one epoch.

    Never from a shared stream: an example varies alike in any batch, on any rank, and after a
    resume.
    """
    return random.Random("/".join(map(str, (seed, epoch, *keys))))


@dataclass(frozen=True)
class Augmentation:
    """What varies in the layout of a block example.

    Attributes:
        block_dropout: Chance that a chunk joins the group of the one before it, so that it sees
            that one as in full attention (arXiv:2605.15913).
        position_jitter: Before every chunk, and before the question, positions jump by 0 to so
            many.

    Raises:
        ValueError: If a value is out of range.
    """

    block_dropout: float = 0.0
    position_jitter: int = 0

    def __post_init__(self):
        if not 0.0 <= self.block_dropout <= 1.0:
            raise ValueError(f"block_dropout must be in [0, 1], got {self.block_dropout}")
        if self.position_jitter < 0:
            raise ValueError(f"position_jitter must be at least 0, got {self.position_jitter}")

    def vary(self, layout: Layout, draw: random.Random) -> Layout:
        """The rows of one block example ``(1, S)`` with wider groups and gaps in positions."""
        if not self.block_dropout and not self.position_jitter:
            return layout
        groups, starts, gap = [], [], 0
        for index in range(int(layout.chunk.max()) + 1):
            joins = index > 0 and draw.random() < self.block_dropout
            groups.append(groups[-1] if joins else index)
            gap += draw.randint(0, self.position_jitter)
            starts.append(gap)
        end = gap + draw.randint(0, self.position_jitter)
        own = torch.tensor(starts)[layout.chunk.clamp(min=0)]
        moved = torch.where(layout.chunk == NO_CHUNK, end, own)
        moved = moved.masked_fill(layout.kind == Kind.PREFIX, 0)
        group = torch.tensor(groups)[layout.group.clamp(min=0)]
        group = torch.where(layout.group == GLOBAL, GLOBAL, group)
        return replace(layout, group=group, position=layout.position + moved)
