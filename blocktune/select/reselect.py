"""Selection that starts over at a deeper layer, from stored states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from blocktune.layout import Layout
from blocktune.select.base import Selection, selectable
from blocktune.select.budget import require_layer, require_share, top_share
from blocktune.select.check import Check
from blocktune.select.deviation import FIRST, distance
from blocktune.select.registry import SELECTORS


@SELECTORS.register("reselect")
@dataclass(frozen=True)
class Reselect(Selection):
    """Chooses by key deviation at one layer, and once more, among all tokens, at a deeper one.

    At ``restart_layer`` the tokens that were dropped come back with the states that their chunks
    carried into it; the layer is computed for all, and the keys of the next one decide. (Keys of
    the layer itself cannot: made from stored states, they are the cached ones.)

    Attributes:
        ratio: Share of the context tokens that stays fresh after either choice, in [0, 1].
        check_layer: Layer (0-based) of the first choice.
        restart_layer: Layer that is computed for all tokens again.

    Raises:
        ValueError: If a value is out of range.

    Source: DroidSpeak (arXiv:2411.02820) as arXiv:2603.20218, section 4.1, adapts it to chunks.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2603.20218"
    ratio: float = 0.15
    check_layer: int = 1
    restart_layer: int = 5

    def __post_init__(self):
        require_share("ratio", self.ratio)
        require_layer("check_layer", self.check_layer, 1, FIRST)
        least = self.check_layer + 1
        require_layer("restart_layer", self.restart_layer, least, "after the check layer")

    @property
    def min_layers(self) -> int:
        """See `Selection.min_layers`: one layer is needed to compare keys in after the restart."""
        return self.restart_layer + 2

    def spends(self, num_layers: int) -> float:
        """See `Selection.spends`."""
        if not self.ratio:
            return 0.0
        full = self.check_layer + 1
        return (full + self.ratio * (num_layers - full)) / num_layers

    def start(self, layout: Layout) -> Tensor:
        """See `Selection.start`: without a budget there is nothing to choose."""
        return selectable(layout) & (self.ratio > 0)

    def checks(self, num_layers: int) -> tuple[int, ...]:
        """See `Selection.checks`."""
        return (self.check_layer, self.restart_layer + 1)

    def widens(self, num_layers: int) -> tuple[int, ...]:
        """See `Selection.widens`."""
        return (self.restart_layer,) if self.ratio else ()

    def refine(self, check: Check) -> Tensor:
        """See `Selection.refine`."""
        scores = distance(check.fresh.keys, check.cached.keys)
        return top_share(scores, check.eligible, check.context_tokens, self.ratio)
