"""Selection of layers instead of tokens: one range of them is computed for the whole context."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from blocktune.layout import Layout
from blocktune.select.base import Selection, selectable
from blocktune.select.budget import require_layer, require_share
from blocktune.select.check import Check
from blocktune.select.registry import SELECTORS


@SELECTORS.register("layer-range")
@dataclass(frozen=True)
class LayerRange(Selection):
    """Every token in a contiguous range of layers, none in the others.

    The first of these layers starts from the states that the chunks carried into it.

    Attributes:
        first_layer: First layer (0-based) of the range.
        ratio: Share of the model's layers in the range, rounded up.

    Raises:
        ValueError: If a value is out of range.

    Source: DroidSpeak arXiv:2411.02820: on average 11 % of the layers are critical. Which ones is
    for `blocktune.engine.intervals` to find out; the default begins at the first layer
    whose keys depend on the context.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2411.02820"
    first_layer: int = 1
    ratio: float = 0.11

    def __post_init__(self):
        require_layer("first_layer", self.first_layer, 0, "0-based")
        require_share("ratio", self.ratio)

    @property
    def min_layers(self) -> int:
        """See `Selection.min_layers`."""
        return self.first_layer + 1

    def with_budget(self, ratio: float) -> Selection:
        """See `Selection.with_budget`: all layers are a range that begins at 0."""
        return replace(self, ratio=ratio, first_layer=0 if ratio == 1 else self.first_layer)

    def layers(self, num_layers: int) -> range:
        """The range in a model of ``num_layers``; cut off at the last one."""
        length = math.ceil(self.ratio * num_layers - 1e-9)
        return range(self.first_layer, min(self.first_layer + length, num_layers))

    def spends(self, num_layers: int) -> float:
        """See `Selection.spends`."""
        return len(self.layers(num_layers)) / num_layers

    def start(self, layout: Layout) -> Tensor:
        """See `Selection.start`."""
        from_below = self.first_layer == 0 and self.ratio > 0
        return selectable(layout) if from_below else torch.zeros_like(layout.is_context)

    def widens(self, num_layers: int) -> tuple[int, ...]:
        """See `Selection.widens`."""
        return (self.first_layer,) if self.first_layer and self.layers(num_layers) else ()

    def checks(self, num_layers: int) -> tuple[int, ...]:
        """See `Selection.checks`."""
        layers = self.layers(num_layers)
        return (layers.stop,) if layers and layers.stop < num_layers else ()

    def refine(self, check: Check) -> Tensor:
        """See `Selection.refine`: the range is over."""
        return torch.zeros_like(check.eligible)
