"""Choose tokens again at a deeper layer, from stored activations."""

from dataclasses import dataclass
from typing import ClassVar

from blocktune.reuse.base import Method, register
from blocktune.select import Reselect, Selection


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

    def selection(self) -> Selection:
        """Deviation, twice."""
        return Reselect(
            ratio=self.ratio, check_layer=self.check_layer, restart_layer=self.restart_layer
        )
