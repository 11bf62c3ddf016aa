"""Recompute a range of layers."""

from dataclasses import dataclass
from typing import ClassVar

from blocktune.reuse.base import Method, register
from blocktune.select import LayerRange, Selection


@register("droidspeak")
@dataclass(frozen=True)
class DroidSpeak(Method):
    """Computes every token in one range of layers, from stored activations, and none elsewhere.

    The paper reuses another model's caches; here they are the chunks' own. Which layers are worth
    computing is measured per model: `blocktune.engine.intervals`. ``ratio`` is the share
    of the layers, 11 % on average in the paper. Keys and values follow from a layer's input, so the
    first layer of the range keeps those that were stored: a range of one layer, which is what 11 %
    of nine layers or fewer is, changes nothing. (That the paper loads the stored activations first
    and the rest meanwhile is a matter of time, not of values, and not done.)
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2411.02820"
    first_layer: int = 1
    ratio: float = 0.11

    def selection(self) -> Selection:
        """The range of layers."""
        return LayerRange(first_layer=self.first_layer, ratio=self.ratio)
