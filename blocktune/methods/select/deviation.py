"""Selection by how far a token's state is from what a full prefill would have made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from blocktune.layout import Layout
from blocktune.methods.registry import SELECTORS
from blocktune.methods.select.base import Selection, selectable
from blocktune.methods.select.budget import (
    require_layer,
    require_share,
    share_count,
    top_count,
    top_share,
)
from blocktune.methods.select.layer_check import LayerCheck, LayerKV

STATES = {"keys": ("keys",), "values": ("values",), "both": ("keys", "values")}
TOTALS = ("context", "cached", "prompt")
FIRST = "at layer 0 keys do not depend on the context yet, so nothing deviates"


def distance(fresh: Tensor, cached: Tensor, squared: bool = False) -> Tensor:
    """Euclidean distance between fresh and cached keys (or values), mean over heads.

    Args:
        fresh: ``(B, K, R, D)``.
        cached: ``(B, K, R, D)``, at the same positions.
        squared: Mean of the squared distances instead: ranks as the distance of all heads at once.

    Returns:
        ``(B, R)`` float32.

    Source: arXiv:2603.20218, section 4.1 (delta K); squared: the code of CacheBlend and LMCache.
    """
    difference = fresh.float() - cached.float()
    return (difference.square().sum(-1) if squared else difference.norm(dim=-1)).mean(dim=1)


def deviation(fresh: LayerKV, cached: LayerKV, by: str = "keys", squared: bool = False) -> Tensor:
    """Sum of the `distance` of the states that ``by`` names, ``(B, R)`` float32."""
    names = STATES[by]
    return sum(distance(getattr(fresh, n), getattr(cached, n), squared) for n in names)


def require_states(by: str) -> None:
    """Refuses what names no states.

    Raises:
        ValueError: If ``by`` is not one of `STATES`.
    """
    if by not in STATES:
        raise ValueError(f"by must be {', '.join(STATES)}, got {by!r}")


@SELECTORS.register("deviation")
@dataclass(frozen=True)
class Deviation(Selection):
    """All tokens up to a check layer; from there on the share whose states deviate most.

    Attributes:
        ratio: Share of the tokens that stays fresh, in [0, 1].
        check_layer: Layer (0-based) whose states are compared. The layers below are computed in
            full; the states of the layer itself are made for all tokens.
        by: What is compared: ``keys``, ``values`` or ``both``.
        squared: Whether distances are squared before heads are averaged.
        of: What the ratio is a share of: the ``context`` tokens, rounded up; all ``cached`` ones
            (the prefix too), rounded down, as CacheBlend's code; or the ``prompt``'s, rounded down,
            of which the question's are always chosen, as in LMCache's code.
        keeps_keys: See `Selection`.
        sees_future: See `Selection`.

    Raises:
        ValueError: If a value is out of range, or the check layer is 0.

    Source: CacheBlend arXiv:2405.16444; the defaults are the form of arXiv:2603.20218.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2405.16444"
    ratio: float = 0.15
    check_layer: int = 1
    by: str = "keys"
    squared: bool = False
    of: str = "context"
    keeps_keys: bool = False
    sees_future: bool = False

    def __post_init__(self):
        require_share("ratio", self.ratio)
        require_layer("check_layer", self.check_layer, 1, FIRST)
        require_states(self.by)
        if self.of not in TOTALS:
            raise ValueError(f"of must be {', '.join(TOTALS)}, got {self.of!r}")

    @property
    def min_layers(self) -> int:
        """See `Selection.min_layers`."""
        return self.check_layer + 1

    def spends(self, num_layers: int) -> float | None:
        """See `Selection.spends`; a share of more than the context is none of the context's."""
        if not self.ratio:
            return 0.0
        if self.of != "context" and self.ratio < 1:
            return None
        return (self.check_layer + self.ratio * (num_layers - self.check_layer)) / num_layers

    def start(self, layout: Layout) -> Tensor:
        """See `Selection.start`: without a budget there is nothing to choose."""
        return selectable(layout) & (self.ratio > 0)

    def checks(self, num_layers: int) -> tuple[int, ...]:
        """See `Selection.checks`."""
        return (self.check_layer,)

    def refine(self, check: LayerCheck) -> Tensor:
        """See `Selection.refine`."""
        scores = deviation(check.fresh, check.cached, self.by, self.squared)
        return top_count(scores, check.eligible, self._count(check))

    def _count(self, check: LayerCheck) -> Tensor:
        if self.of == "context":
            return share_count(check.context_tokens, self.ratio)
        if self.of == "cached":
            return _floor(check.prompt_tokens - check.other_tokens, self.ratio)
        return _floor(check.prompt_tokens, self.ratio) - check.other_tokens


def _floor(total: Tensor, ratio: float) -> Tensor:
    return (total.double() * ratio + 1e-9).floor().long()


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

    def refine(self, check: LayerCheck) -> Tensor:
        """See `Selection.refine`."""
        scores = deviation(check.fresh, check.cached, self.by)
        share = self.share_at(check.layer, check.num_layers)
        return top_share(scores, check.eligible, check.context_tokens, share)
