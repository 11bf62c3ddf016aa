"""The order of rows in each epoch, random choices for each row, and what is done between steps."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler
from transformers import TrainerCallback
from transformers.trainer_pt_utils import get_length_grouped_indices

from blocktune.memory import trim_memory

TRIM_S = 60.0  # between two returns of freed memory, each about 0.5 s for 10 GB


def draw_of(seed: int, epoch: int, *keys: object) -> random.Random:
    """A random generator for one example in one epoch, in any batch, on any rank, when resumed."""
    return random.Random("/".join(map(str, (seed, epoch, *keys))))


class EpochOrder(Sampler[int]):
    """The order of an epoch's rows, which depends only on seed and epoch.

    Transformers draws from the global random generator, whose state differs after a resume and
    between ranks: rows would come twice or never.

    The last ``num_blank`` rows have no labels and stay last. The ``group`` rows of one optimizer
    step, over accumulation and ranks, have similar length; None mixes all.
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


class EpochCallback(TrainerCallback):
    """Starts the clock, sets the epoch of collator and order, and on CPUs returns freed memory."""

    def __init__(self, trainer):
        self.trainer, self._trimmed = trainer, time.monotonic()

    def on_train_begin(self, args, state, control, **kwargs):
        """Starts the clock."""
        self.trainer._total_train_tokens = state.num_input_tokens_seen
        self.trainer.speed.start(self.trainer._total_train_tokens, state.global_step)

    def on_epoch_begin(self, args, state, control, **kwargs):
        """Sets the epoch before its first batch."""
        # After a resume the epoch is a fraction; rounding must not give the previous epoch.
        epoch = int((state.epoch or 0) + 1e-6)
        self.trainer.collator.epoch = epoch
        if self.trainer.order is not None:
            self.trainer.order.epoch = epoch

    def on_step_end(self, args, state, control, **kwargs):
        """Returns the memory that tensors of other lengths have left in the C library."""
        if args.device.type == "cpu" and time.monotonic() - self._trimmed > TRIM_S:
            trim_memory()
            self._trimmed = time.monotonic()
