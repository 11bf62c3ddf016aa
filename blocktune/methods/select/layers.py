"""Selectors of layers: one range of them, or a second choice at a deeper layer."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from blocktune.methods.registry import SELECTORS
from blocktune.methods.select.base import Selection, selectable
from blocktune.methods.select.budget import top_share
from blocktune.methods.select.deviation import FIRST, distance
from blocktune.registry import require_count

if TYPE_CHECKING:
    from torch import Tensor

    from blocktune.layout import Layout
    from blocktune.methods.select.base import LayerCheck


@SELECTORS.register("layer-range")
@dataclass(frozen=True)
class LayerRange(Selection):
    """Every token in a contiguous range of layers, none in the others.

    The first of these layers starts from the stored hidden states of the chunks.

    Attributes:
        first_layer: First layer (0-based) of the range.
        ratio: Share of the model's layers in the range, rounded up.

    Source: DroidSpeak arXiv:2411.02820: on average 11 % of the layers are critical. Measure which
    ones with `blocktune.engine.layer_profile`; the default starts at the first layer whose keys
    depend on the context.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2411.02820"
    first_layer: int = 1
    ratio: float = 0.11

    def __post_init__(self):
        super().__post_init__()
        require_count("first_layer", self.first_layer)

    @property
    def min_layers(self) -> int:
        """The range has at least one layer."""
        return self.first_layer + 1

    def with_budget(self, ratio: float) -> Selection:
        """A range of that share of the layers; that of all layers starts at 0."""
        return replace(self, ratio=ratio, first_layer=0 if ratio == 1 else self.first_layer)

    def layers(self, num_layers: int) -> range:
        """The range in a model of ``num_layers``, cut off at the last one."""
        length = math.ceil(self.ratio * num_layers - 1e-9)
        return range(self.first_layer, min(self.first_layer + length, num_layers))

    def spends(self, num_layers: int) -> float:
        """Layers of the range."""
        return len(self.layers(num_layers)) / num_layers

    def start(self, layout: Layout) -> Tensor:
        """Every token if the range starts at layer 0."""
        return selectable(layout) & (self.first_layer == 0 and self.ratio > 0)

    def widens(self, num_layers: int) -> tuple[int, ...]:
        """The first layer of the range, unless it is 0."""
        return (self.first_layer,) if self.first_layer and self.layers(num_layers) else ()

    def checks(self, num_layers: int) -> tuple[int, ...]:
        """The layer after the range."""
        layers = self.layers(num_layers)
        return (layers.stop,) if layers and layers.stop < num_layers else ()

    def refine(self, check: LayerCheck) -> Tensor:
        """No row: the range has ended."""
        import torch

        return torch.zeros_like(check.eligible)


@SELECTORS.register("reselect")
@dataclass(frozen=True)
class Reselect(Selection):
    """Chooses by key deviation at one layer, and again among all tokens at a deeper one.

    At ``restart_layer`` the dropped tokens come back with the hidden states stored for their
    chunks; that layer is computed for all tokens, and the keys of the next one decide. (Keys of the
    restart layer itself cannot: computed from stored states, they equal the cached ones.)

    Attributes:
        ratio: Share of the context tokens recomputed after each choice, in [0, 1].
        check_layer: Layer (0-based) of the first choice.
        restart_layer: Layer that is computed for all tokens again.

    Source: DroidSpeak (arXiv:2411.02820) as arXiv:2603.20218, section 4.1, adapts it to chunks.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2603.20218"
    ratio: float = 0.15
    check_layer: int = 1
    restart_layer: int = 5

    def __post_init__(self):
        super().__post_init__()
        require_count("check_layer", self.check_layer, 1, FIRST)
        after = self.check_layer + 1
        require_count("restart_layer", self.restart_layer, after, "after the check layer")

    @property
    def min_layers(self) -> int:
        """Keys are compared one layer after the restart."""
        return self.restart_layer + 2

    def spends(self, num_layers: int) -> float:
        """Two layers and those below in full, and the share of the others."""
        if not self.ratio:
            return 0.0
        full = self.check_layer + 1
        return (full + self.ratio * (num_layers - full)) / num_layers

    def start(self, layout: Layout) -> Tensor:
        """Every token; a ratio of 0 recomputes nothing at all."""
        return selectable(layout) & (self.ratio > 0)

    def checks(self, num_layers: int) -> tuple[int, ...]:
        """The check layer, and the one after the restart."""
        return (self.check_layer, self.restart_layer + 1)

    def widens(self, num_layers: int) -> tuple[int, ...]:
        """The restart layer."""
        return (self.restart_layer,) if self.ratio else ()

    def refine(self, check: LayerCheck) -> Tensor:
        """Rows whose keys deviate most."""
        scores = distance(check.fresh.keys, check.cached.keys)
        return top_share(scores, check.eligible, check.context_tokens, self.ratio)
