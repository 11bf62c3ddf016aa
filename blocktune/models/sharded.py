"""Whole parameters split over processes (ZeRO-3, FSDP2). All processes must call these."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from torch import Tensor


@contextmanager
def gathered(*weights: Tensor, write: bool = False) -> Iterator[None]:
    """Makes split parameters whole inside the block; ``write`` keeps the changes by process 0."""
    split = [weight for weight in weights if hasattr(weight, "ds_id")]
    context = nullcontext()
    if split:
        import deepspeed

        context = deepspeed.zero.GatheredParameters(split, modifier_rank=0 if write else None)
    with context:
        yield


@contextmanager
def loading_whole() -> Iterator[None]:
    """Inside the block, models are loaded completely, also in and after a run with ZeRO-3."""
    from transformers.integrations import deepspeed  # only for training

    config = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = config


def fill(weight: Tensor, values: Tensor) -> None:
    """Writes values of the whole shape, equal in all processes, into a parameter, split or not."""
    if hasattr(weight, "device_mesh"):  # FSDP2
        from torch.distributed.tensor import distribute_tensor

        values = distribute_tensor(values, weight.device_mesh, weight.placements)
    with gathered(weight, write=True):
        weight.copy_(values)


def whole_shape(weight: Tensor) -> tuple[int, ...]:
    """The full shape of a parameter, split or not."""
    return tuple(getattr(weight, "ds_shape", weight.shape))
