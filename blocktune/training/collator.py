"""From rows of the dataset to the tensors of one step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from blocktune.prompt import LayoutSpec, lay_out, stack
from blocktune.training.dataset import to_pieces

FULL_ATTENTION = LayoutSpec(block=False)


@dataclass(frozen=True)
class BlockCollator:
    """Lays pieces out and pads them to the longest of the batch.

    Attributes:
        spec: Layout of block examples; the others are plain prompts in full attention.
        pad_id: Token id of pad rows.
        link_base: Id of link slot 0, or None without links.
    """

    spec: LayoutSpec
    pad_id: int
    link_base: int | None = None

    def __call__(self, records: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Returns ``input_ids`` and ``labels`` ``(B, S)`` and ``layout`` ``(B, S, fields)``."""
        prompts = [
            lay_out(to_pieces(r), self.spec if r["block"] else FULL_ATTENTION, self.link_base)
            for r in records
        ]
        batch = stack(prompts, self.pad_id)
        return {
            "input_ids": batch.input_ids,
            "labels": batch.labels,
            "layout": batch.layout.pack(),
        }
