"""From rows of the dataset to the tensors of one step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, NamedTuple

import torch
from torch import Tensor

from blocktune.layout import FOREVER
from blocktune.prompt import Batch, LayoutSpec, Pieces, Prompt, lay_out, pack, stack
from blocktune.training.augment import Augmentation, draw_of
from blocktune.training.dataset import to_pieces
from blocktune.training.fresh_rows import with_fresh_rows
from blocktune.training.recompute import RecomputeSampler

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
