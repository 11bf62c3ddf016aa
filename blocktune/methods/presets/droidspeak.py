"""DroidSpeak: recompute a range of layers, or choose tokens again at a deeper layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from blocktune.methods.base import Method, register
from blocktune.methods.select import LayerRange, Reselect, Selection


@register("droidspeak")
@dataclass(frozen=True)
class DroidSpeak(Method):
    """Computes every token in one range of layers, from stored activations, and none elsewhere.

    The paper reuses another model's caches; here they are the chunks' own. Which layers are worth
    computing is measured per model: `blocktune.engine.layer_profile`. ``ratio`` is the share
    of the layers, 11 % on average in the paper. Keys and values follow from a layer's input, so the
    first layer of the range keeps those that were stored: a range of one layer, which is what 11 %
    of nine layers or fewer is, changes nothing. (That the paper loads the stored activations first
    and the rest meanwhile is a matter of time, not of values, and not done.)
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2411.02820"
    first_layer: int = 1
    ratio: float = 0.11

    def select(self) -> Selection:
        """The range of layers."""
        return LayerRange(first_layer=self.first_layer, ratio=self.ratio)


@register("droidspeak-clc")
@dataclass(frozen=True)
class DroidSpeakCLC(Method):
    """Chooses tokens by key deviation at layer 1, and again among all tokens at a deeper layer.

    The study's adaptation of DroidSpeak to chunks: the deeper layer starts from what the chunks
    carried into it, which no other chunk took part in.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2603.20218"
    ratio: float = 0.15
    check_layer: int = 1
    restart_layer: int = 5

    def select(self) -> Selection:
        """Deviation, twice."""
        return Reselect(
            ratio=self.ratio, check_layer=self.check_layer, restart_layer=self.restart_layer
        )
