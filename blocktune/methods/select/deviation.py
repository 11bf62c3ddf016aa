"""Selectors by deviation: how far cached keys and values are from those of a full prefill."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from blocktune.methods.registry import SELECTORS
from blocktune.methods.select.base import Selection, selectable
from blocktune.methods.select.budget import (
    require_layer,
    require_share,
    share_count,
    top_count,
    top_share,
)

if TYPE_CHECKING:
    from torch import Tensor

    from blocktune.layout import Layout
    from blocktune.methods.select.layer_check import LayerCheck

STATES = {"keys": ("keys",), "values": ("values",), "both": ("keys", "values")}
TOTALS = ("context", "cached")
FIRST = "at layer 0 keys do not depend on the context yet, so nothing deviates"


def distance(fresh: Tensor, cached: Tensor, squared: bool = False) -> Tensor:
    """Euclidean distance between fresh and cached keys (or values), mean over heads.

    Args:
        fresh: ``(B, K, R, D)``.
        cached: ``(B, K, R, D)``, at the same positions.
        squared: Average squared distances instead: ranks like the distance of all heads at once.

    Returns:
        ``(B, R)`` float32.

    Source: arXiv:2603.20218, section 4.1 (delta K); squared: the code of CacheBlend and LMCache.
    """
    difference = fresh.float() - cached.float()
    return (difference.square().sum(-1) if squared else difference.norm(dim=-1)).mean(dim=1)


class _Deviating(Selection):
    """All tokens up to ``check_layer``, then those whose states, named by ``by``, deviate most."""

    def _validate(self) -> None:
        require_share("ratio", self.ratio)
        require_layer("check_layer", self.check_layer, 1, FIRST)
        if self.by not in STATES:
            raise ValueError(f"by must be {', '.join(STATES)}, got {self.by!r}")

    @property
    def min_layers(self) -> int:
        """See `Selection.min_layers`."""
        return self.check_layer + 1

    def start(self, layout: Layout) -> Tensor:
        """See `Selection.start`; a ratio of 0 recomputes nothing at all."""
        return selectable(layout) & (self.ratio > 0)

    def _scores(self, check: LayerCheck, squared: bool = False) -> Tensor:
        fresh, cached = check.fresh, check.cached
        names = STATES[self.by]
        return sum(distance(getattr(fresh, n), getattr(cached, n), squared) for n in names)


@SELECTORS.register("deviation")
@dataclass(frozen=True)
class Deviation(_Deviating):
    """All tokens up to a check layer, then the share whose keys or values deviate most.

    Attributes:
        ratio: Share of the tokens recomputed after the check layer, in [0, 1].
        check_layer: Layer (0-based) at which keys or values are compared. Layers below it are
            computed in full, and so are the compared keys and values of the layer itself.
        by: What is compared: ``keys``, ``values`` or ``both``.
        squared: Square distances before averaging over heads.
        of: What the ratio is a share of: the ``context`` tokens, rounded up; or all ``cached``
            tokens, a cached prefix included, rounded down (the code of CacheBlend and LMCache).
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
        self._validate()
        if self.of not in TOTALS:
            raise ValueError(f"of must be {' or '.join(TOTALS)}, got {self.of!r}")

    def spends(self, num_layers: int) -> float | None:
        """See `Selection.spends`; None for a share of all cached tokens."""
        if not self.ratio:
            return 0.0
        if self.of == "cached" and self.ratio < 1:
            return None
        return (self.check_layer + self.ratio * (num_layers - self.check_layer)) / num_layers

    def checks(self, num_layers: int) -> tuple[int, ...]:
        """See `Selection.checks`."""
        return (self.check_layer,)

    def refine(self, check: LayerCheck) -> Tensor:
        """See `Selection.refine`."""
        count = share_count(check.context_tokens, self.ratio)
        if self.of == "cached":
            count = (check.cached_tokens.double() * self.ratio + 1e-9).floor().long()
        return top_count(self._scores(check, self.squared), check.eligible, count)


@SELECTORS.register("gradual-deviation")
@dataclass(frozen=True)
class GradualDeviation(_Deviating):
    """Drops, at every layer, the tokens that deviate least among those still recomputed.

    The share falls linearly from ``ratio * (1 + spread)`` after the check layer to
    ``ratio * (1 - spread)`` in the last one, so its mean is ``ratio``. The paper only says that
    the shares fall from slightly above the mean to slightly below; the straight line is ours.

    Attributes:
        ratio: Mean share of the context tokens over the layers from the check layer on.
        spread: Relative distance of the first and the last share from the mean, in [0, 1].
        check_layer: First layer (0-based) that compares; the layers below are computed in full.
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
        self._validate()
        require_share("spread", self.spread)

    def share_at(self, layer: int, num_layers: int) -> float:
        """Share of the context tokens that is recomputed from ``layer`` on, at most 1."""
        last = num_layers - 1 - self.check_layer
        at = 2 * (layer - self.check_layer) / last - 1 if last else 0.0
        return min(1.0, self.ratio * (1 - self.spread * at * (self.ratio < 1)))

    def spends(self, num_layers: int) -> float:
        """See `Selection.spends`."""
        if not self.ratio:
            return 0.0
        kept = sum(self.share_at(layer, num_layers) for layer in self.checks(num_layers))
        return (self.check_layer + kept) / num_layers

    def checks(self, num_layers: int) -> tuple[int, ...]:
        """See `Selection.checks`."""
        return tuple(range(self.check_layer, num_layers))

    def refine(self, check: LayerCheck) -> Tensor:
        """See `Selection.refine`."""
        share = self.share_at(check.layer, check.num_layers)
        return top_share(self._scores(check), check.eligible, check.context_tokens, share)
