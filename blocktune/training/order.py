"""The order of a dataset's rows in each epoch, and the random choices for each row."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices


def draw_of(seed: int, epoch: int, *keys: object) -> random.Random:
    """A random generator for one example in one epoch.

    So an example varies the same way in any batch, on any rank, and after a resume.
    """
    return random.Random("/".join(map(str, (seed, epoch, *keys))))


class EpochOrder(Sampler[int]):
    """The order of an epoch's rows, which depends only on seed and epoch.

    Transformers draws groups of similar length from the global random generator. Its state differs
    after a resume, and dropout can make it differ between ranks: rows would come twice or never.

    The last ``num_blank`` rows have no labels and stay last. The ``group`` rows of one optimizer
    step, over accumulation and ranks, have similar length; None mixes all. Set ``epoch`` first.
    """

    def __init__(self, lengths: Sequence[int], num_blank: int, group: int | None, seed: int):
        self.lengths, self.num_blank = list(lengths), num_blank
        self.group, self.seed, self.epoch = group, seed, 0

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
