"""DroidSpeak: recompute a range of layers, or choose tokens again at a deeper layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from blocktune.methods import LayerRange, Method, Reselect, Selection, register


@register("droidspeak")
@dataclass(frozen=True)
class DroidSpeak(Method):
    """Recomputes all tokens in one range of layers, from stored activations, and none elsewhere.

    The paper reuses the cache of another model; here it is the chunks' own. Measure which layers
    to recompute with `blocktune.engine.layer_profile`. ``ratio`` is the share of the layers, 11 %
    on average in the paper. Keys and values follow from a layer's input, so the first layer of the
    range keeps the stored ones: a range of one layer (11 % of nine layers or fewer) changes
    nothing. The paper loads the activations first and the rest meanwhile; that changes time, not
    values, and is not done here.
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
    """Selects tokens by key deviation at layer 1, and again among all tokens at a deeper layer.

    The study's adaptation of DroidSpeak to chunks: the deeper layer starts from the hidden states
    stored for each chunk, which no other chunk has influenced.
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
