"""From rows of the dataset to the tensors of one step, varied from epoch to epoch."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any, NamedTuple

import torch
from torch import Tensor

from blocktune.layout import FOREVER, GLOBAL, NO_CHUNK, Kind, Layout
from blocktune.prompt import Batch, LayoutSpec, Pieces, Prompt, lay_out, pack, stack
from blocktune.training.dataset import to_pieces
from blocktune.training.recompute import RecomputeSampler, with_fresh_rows


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


FULL_ATTENTION = LayoutSpec(block=False)
NOT_ASKED = -1.0
"""Share of a packed prompt whose fresh rows are not chosen in a layer."""


class Laid(NamedTuple):
    """One example laid out: for the student, for its teacher, and its share of fresh tokens."""

    prompt: Prompt
    taught: Prompt | None
    share: float


@dataclass
class BlockCollator:
    """Lays pieces out, packs what belongs to one row, and pads rows to the longest of the batch.

    Attributes:
        spec: Layout of block examples; the others are plain prompts in full attention.
        pad_id: Token id of pad rows.
        link_base: Id of the first learned token, or None without any.
        augmentation: How the layout of block examples varies.
        sampler: Which tokens of block examples are fresh, or None.
        check_layer: Layer at which the sampler is asked again, or None.
        has_teacher: Whether to lay out what a teacher reads: in full attention, no tag of a mode.
        seed: Of all draws.
        epoch: Likewise; the trainer sets it.
    """

    spec: LayoutSpec
    pad_id: int
    link_base: int | None = None
    augmentation: Augmentation = field(default_factory=Augmentation)
    sampler: RecomputeSampler | None = None
    check_layer: int | None = None
    has_teacher: bool = False
    seed: int = 0
    epoch: int = 0

    @property
    def row_growth(self) -> float:
        """Rows over tokens that fresh rows make of a block example, at most."""
        if self.sampler is None:
            return 1.0
        return 2.0 if self.check_layer is not None else 1.0 + self.sampler.high

    def __call__(self, records: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Returns ``input_ids`` and ``labels`` ``(B, S)`` and ``layout`` ``(B, S, fields)``.

        With a teacher also its own three, named ``teacher_...``; with a sampler that is asked
        again in a layer also ``shares``, ``(B, prompts)`` float64: of each packed prompt the share
        of tokens that stays fresh there, or `NOT_ASKED`.
        """
        rows = [[self._lay_out(part) for part in record["parts"]] for record in records]
        batch = self._tensors([laid.prompt for laid in row] for row in rows)
        if self.has_teacher:
            taught = self._tensors([laid.taught for laid in row] for row in rows)
            batch |= {f"teacher_{name}": value for name, value in taught.items()}
        if self.check_layer is not None:
            batch["shares"] = _padded([[laid.share for laid in row] for row in rows])
        return batch

    def _lay_out(self, part: dict[str, Any]) -> Laid:
        draw = draw_of(self.seed, self.epoch, part["index"], part["block"])
        pieces = to_pieces(part)
        taught = None
        if self.has_teacher:
            plain = pieces._replace(prefix=tuple(part["teacher_prefix"]))
            taught = lay_out(plain, FULL_ATTENTION)
        if not part["block"]:
            return Laid(lay_out(pieces, FULL_ATTENTION), taught, NOT_ASKED)
        return self._lay_out_block(pieces, taught, draw)

    def _lay_out_block(self, pieces: Pieces, taught: Prompt | None, draw: Random) -> Laid:
        prompt = lay_out(pieces, self.spec, self.link_base)
        varied = self.augmentation.vary(prompt.layout, draw)
        prompt = Prompt(prompt.ids, varied, prompt.labels)
        if self.sampler is None:
            return Laid(prompt, taught, NOT_ASKED)
        share = self.sampler.share(draw)
        chosen = self.sampler.selector(share, draw).start(prompt.layout)
        until = FOREVER if self.check_layer is None else self.check_layer
        return Laid(with_fresh_rows(prompt, chosen, until), taught, share)

    def _tensors(self, rows: Sequence[list[Prompt]]) -> dict[str, Tensor]:
        batch: Batch = stack([_joined(row) for row in rows], self.pad_id)
        return {
            "input_ids": batch.input_ids,
            "labels": batch.labels,
            "layout": batch.layout.pack(),
        }


def _joined(prompts: list[Prompt]) -> Prompt:
    return prompts[0] if len(prompts) == 1 else pack(prompts)


def _padded(rows: list[list[float]]) -> Tensor:
    width = max(map(len, rows))
    padded = [row + [NOT_ASKED] * (width - len(row)) for row in rows]
    return torch.tensor(padded, dtype=torch.float64)
