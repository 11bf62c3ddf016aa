"""Selection that narrows at every layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from blocktune.layout import Layout
from blocktune.select.base import Selection, selectable
from blocktune.select.budget import require_layer, require_share, top_share
from blocktune.select.check import Check
from blocktune.select.deviation import FIRST, deviation, require_states
from blocktune.select.registry import SELECTORS


@SELECTORS.register("gradual-deviation")
@dataclass(frozen=True)
class GradualDeviation(Selection):
    """Drops tokens at every layer: those whose states deviate least among the ones still fresh.

    The share falls linearly from ``ratio * (1 + spread)`` after the check layer to
    ``ratio * (1 - spread)`` in the last one, so that its mean is ``ratio``. The paper says only
    that the shares fall, from slightly above the mean to slightly below: the line is ours.

    Attributes:
        ratio: Mean share of the context tokens over the layers from the check layer on.
        spread: How far the first and last share are from the mean, as a share of it, in [0, 1].
        check_layer: First layer (0-based) that compares; the ones below are computed in full.
        by: What is compared: ``keys``, ``values`` or ``both``.

    Raises:
        ValueError: If a value is out of range, or the check layer is 0.

    Source: CacheBlend arXiv:2405.16444, gradual filtering.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2405.16444"
    keeps_keys: ClassVar[bool] = True  # a layer's states serve that layer and choose for the next
    ratio: float = 0.15
    spread: float = 0.2
    check_layer: int = 1
    by: str = "both"

    def __post_init__(self):
        require_share("ratio", self.ratio)
        require_share("spread", self.spread)
        require_layer("check_layer", self.check_layer, 1, FIRST)
        require_states(self.by)

    @property
    def min_layers(self) -> int:
        """See `Selection.min_layers`."""
        return self.check_layer + 1

    def share_at(self, layer: int, num_layers: int) -> float:
        """Share of the context tokens that stays fresh from ``layer`` on, at most 1."""
        last = num_layers - 1 - self.check_layer
        at = 2 * (layer - self.check_layer) / last - 1 if last else 0.0
        return min(1.0, self.ratio * (1 - self.spread * at * (self.ratio < 1)))

    def spends(self, num_layers: int) -> float:
        """See `Selection.spends`."""
        if not self.ratio:
            return 0.0
        layers = range(self.check_layer, num_layers)
        kept = sum(self.share_at(layer, num_layers) for layer in layers)
        return (self.check_layer + kept) / num_layers

    def start(self, layout: Layout) -> Tensor:
        """See `Selection.start`: without a budget there is nothing to choose."""
        return selectable(layout) & (self.ratio > 0)

    def checks(self, num_layers: int) -> tuple[int, ...]:
        """See `Selection.checks`."""
        return tuple(range(self.check_layer, num_layers))

    def refine(self, check: Check) -> Tensor:
        """See `Selection.refine`."""
        scores = deviation(check.fresh, check.cached, self.by)
        share = self.share_at(check.layer, check.num_layers)
        return top_share(scores, check.eligible, check.context_tokens, share)
