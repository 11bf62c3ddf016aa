"""LoRA without passes over its outputs, and the precision that trained weights keep."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

from blocktune.models.quantize import quantization_of


class AddedLora(Linear):
    """PEFT's LoRA of a linear layer, the same numbers with fewer passes over memory.

    PEFT multiplies the product of A and B by its scale and adds it: two tensors as large as the
    layer's output, written and read again, and their gradients likewise. Here BLAS adds it onto the
    output in the product itself. All but plain LoRA of whole weights in one precision (dropout,
    DoRA, autocast, adapters that are off, merged or several, weights that FSDP or ZeRO-3 shard)
    goes PEFT's way.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``x W^T + scale (x A^T) B^T`` for ``x`` ``(..., in)``; returns ``(..., out)``."""
        name = self._plain_adapter(x)
        if name is None or args or kwargs:
            return super().forward(x, *args, **kwargs)
        rows = x.flatten(0, -2)
        out = self.base_layer(rows)
        weight = self.lora_B[name].weight
        out.addmm_(self.lora_A[name](rows), weight.t(), alpha=self.scaling[name])
        return out.unflatten(0, x.shape[:-1])

    def _plain_adapter(self, x: Tensor) -> str | None:
        """The one adapter that applies, if it is nothing but whole A and B and a scale."""
        names = self.active_adapters
        if self.disable_adapters or self.merged or len(names) != 1 or x.ndim < 2:
            return None
        (name,) = names
        if name not in self.lora_A or name in self.lora_variant:
            return None
        second, dtypes = self.lora_B[name], {x.dtype, self.base_layer.weight.dtype}
        plain = (
            isinstance(self.lora_dropout[name], nn.Identity)
            and second.bias is None
            and dtypes == {second.weight.dtype}
            and not torch.is_autocast_enabled(x.device.type)
        )
        return name if plain and _is_whole(second) else None


def _is_whole(linear: nn.Linear) -> bool:
    """Whether the weight can be read from outside of its module; a sharded one cannot."""
    shape = (linear.out_features, linear.in_features)
    return tuple(linear.weight.shape) == shape and not hasattr(linear.weight, "placements")


def add_in_product(config: Any, model: nn.Module) -> None:
    """Lets PEFT make `AddedLora` of linear layers; those of a quantised base keep PEFT's classes.

    Args:
        config: Of the adapter; only LoRA's is touched.
        model: The base that it is for.
    """
    if isinstance(config, LoraConfig) and quantization_of(model) is None:
        config._register_custom_module({nn.Linear: AddedLora})


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
