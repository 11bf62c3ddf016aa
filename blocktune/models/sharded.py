"""Parameters that a launch has split over processes, read and written as a whole.

Every process must call these functions, since they exchange data between all processes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor


@contextmanager
def gathered(*weights: Tensor, write: bool = False) -> Iterator[None]:
    """Inside the block, split parameters are whole; ``write`` keeps what process 0 writes there."""
    split = [weight for weight in weights if is_split(weight)]
    if not split:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(split, modifier_rank=0 if write else None):
        yield


def fill(weight: Tensor, values: Tensor) -> None:
    """Writes values of the whole shape, equal in every process, into a parameter, split or not."""
    if hasattr(weight, "device_mesh"):  # FSDP2's
        from torch.distributed.tensor import distribute_tensor

        values = distribute_tensor(values, weight.device_mesh, weight.placements)
    with gathered(weight, write=True):
        weight.copy_(values)


def is_split(weight: Tensor) -> bool:
    """Whether ZeRO-3 holds a part of the parameter in each process."""
    return hasattr(weight, "ds_id")


def whole_shape(weight: Tensor) -> tuple[int, ...]:
    """The shape of a parameter, whether it is split or not."""
    return tuple(weight.ds_shape if is_split(weight) else weight.shape)


def num_elements(weight: Tensor) -> int:
    """How many elements a parameter has, whether it is split or not."""
    return math.prod(whole_shape(weight))
