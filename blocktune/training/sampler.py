"""In which order an epoch goes through the training set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

from blocktune.training.collator import draw_of


class EpochOrder(Sampler[int]):
    """Rows of an epoch in an order that only seed and epoch decide.

    Transformers draws groups of similar length from the global stream, which a resume finds in
    another state and dropout may move apart between ranks: rows would come twice or never.

    Args:
        lengths: Of the rows, in tokens.
        num_blank: Rows at the end that teach nothing; they close every epoch, so that it is the
            last batch alone that has them.
        group: Rows of one optimizer step, over accumulation and ranks, to be of similar length;
            None mixes all.
        seed: Of the order.

    Attributes:
        epoch: Counted from 0; to be set before an epoch begins.
    """

    def __init__(self, lengths: Sequence[int], num_blank: int, group: int | None, seed: int):
        self.lengths, self.num_blank = list(lengths), num_blank
        self.group, self.seed = group, seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        count = len(self.lengths) - self.num_blank
        stream = torch.Generator()
        stream.manual_seed(draw_of(self.seed, self.epoch).getrandbits(63))
        if self.group is None:
            order = torch.randperm(count, generator=stream).tolist()
        else:
            lengths = self.lengths[:count]
            order = get_length_grouped_indices(lengths, self.group, generator=stream)
        return iter([*order, *range(count, len(self.lengths))])
