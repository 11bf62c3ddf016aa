"""A model's decoder layers, and the one hook on each of them.

The hooks stay for good and hold no state: they hand the layer's input to the plan that came with
the forward pass, if that plan wants it. So passes of several threads over one model do not meet.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from blocktune.attention import Plan
from blocktune.attention.kernels import AttentionParams
from blocktune.layout import LayerRule


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The model's decoder layers, through a PEFT wrapper or not.

    Raises:
        ValueError: If there is no list of as many layers as the config says.
    """
    depth = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if name.endswith("layers") and isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise ValueError(
        f"{type(model).__name__} has no list of {depth} decoder layers to hook into; "
        "blocktune serves decoders whose layers stand in one list"
    )


@dataclass(frozen=True)
class Enter:
    """Hands a layer's input to the plan's ``enter``, where it has one."""

    index: int

    def __call__(self, layer: nn.Module, args: tuple, kwargs: dict) -> Any:
        """A forward pre-hook."""
        enter = getattr(kwargs.get("plan"), "enter", None)
        return None if enter is None else enter(self.index, layer, args, kwargs)


def install(model: nn.Module) -> None:
    """Puts the hooks on, once; without a plan that enters they change nothing.

    Raises:
        ValueError: See `decoder_layers`.
    """
    for index, layer in enumerate(decoder_layers(model)):
        if Enter(index) not in layer._forward_pre_hooks.values():
            layer.register_forward_pre_hook(Enter(index), with_kwargs=True)


class InputRecorder:
    """A plan that attends by another one, and keeps what entered some layers.

    Attributes:
        inputs: Hidden states ``(B, S, hidden)``, by layer.
    """

    def __init__(self, plan: Plan, layers: Container[int]):
        """Keeps what enters ``layers``."""
        self.plan, self.layers = plan, layers
        self.inputs: dict[int, Tensor] = {}

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, rule: LayerRule, params: AttentionParams
    ) -> Tensor:
        """See `Plan.attend`."""
        return self.plan.attend(query, key, value, rule, params)

    def enter(self, index: int, layer: nn.Module, args: tuple, kwargs: dict) -> None:
        """A forward pre-hook that changes nothing."""
        if index in self.layers:
            self.inputs[index] = args[0]
