"""The precision that trained weights keep."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def precision_kept(model: nn.Module) -> Iterator[None]:
    """Trained weights leave the block as they came, on the device where they are then.

    TRL rounds what is trained on a quantised base to bfloat16, link rows too: steps smaller than
    1/256 of a weight are lost, and serving, which reads float32 adapters, is off by as much.
    QLoRA (arXiv:2305.14314) means products in bfloat16, which autocast makes of float32 weights.
    """
    kept = [(weight, weight.data) for weight in model.parameters() if weight.requires_grad]
    yield
    for weight, data in kept:
        if weight.dtype != data.dtype:
            weight.data = data.to(weight.device)
