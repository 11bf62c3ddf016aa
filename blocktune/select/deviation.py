"""Selection by how far a token's state is from what a full prefill would have made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from blocktune.layout import Layout
from blocktune.select.base import Selection, selectable
from blocktune.select.budget import require_layer, require_share, share_count, top_count
from blocktune.select.check import Check, States
from blocktune.select.registry import SELECTORS

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


def deviation(fresh: States, cached: States, by: str = "keys", squared: bool = False) -> Tensor:
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

    def refine(self, check: Check) -> Tensor:
        """See `Selection.refine`."""
        scores = deviation(check.fresh, check.cached, self.by, self.squared)
        return top_count(scores, check.eligible, self._count(check))

    def _count(self, check: Check) -> Tensor:
        if self.of == "context":
            return share_count(check.context_tokens, self.ratio)
        if self.of == "cached":
            return _floor(check.prompt_tokens - check.other_tokens, self.ratio)
        return _floor(check.prompt_tokens, self.ratio) - check.other_tokens


def _floor(total: Tensor, ratio: float) -> Tensor:
    return (total.double() * ratio + 1e-9).floor().long()
