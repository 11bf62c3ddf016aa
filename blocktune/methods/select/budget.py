"""How many tokens a share is, which ones score highest, and selectors at equal cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from blocktune.methods.select.base import Selection, selectable

if TYPE_CHECKING:
    from torch import Tensor

    from blocktune.layout import Layout

MATCHED = 0.005
"""Shares of layer-tokens that differ by no more count as equal."""
SMALLEST = 1e-9
"""A ratio above 0 that chooses no token."""
Selector = TypeVar("Selector", bound=Selection)


def share_count(total: Tensor, ratio: float) -> Tensor:
    """Whole tokens in a share of ``total`` ``(B,)``, rounded up."""
    # 0.15 * 20 is 3.0000000000000004 in floating point: not 4 tokens.
    return (total.double() * ratio - 1e-9).ceil().long()


def top_count(scores: Tensor, eligible: Tensor, count: Tensor) -> Tensor:
    """The ``count`` ``(B,)`` highest-scoring tokens of each prompt, bool ``(B, R)``.

    Of equals, the earlier one. ``scores`` ``(B, R)``; ``eligible`` may be chosen, ``(B, R)`` bool.
    """
    ranked = scores.float().masked_fill(~eligible, float("-inf"))
    rank = ranked.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return eligible & (rank < count[:, None])


def top_share(scores: Tensor, eligible: Tensor, total: Tensor, ratio: float) -> Tensor:
    """As `top_count`, for the share ``ratio`` of ``total`` ``(B,)`` tokens, rounded up."""
    return top_count(scores, eligible, share_count(total, ratio))


def top_of_context(scores: Tensor, layout: Layout, ratio: float) -> Tensor:
    """As `top_share`, for a share of the context tokens; scores are of the layout's rows."""
    return top_share(scores, selectable(layout), layout.is_context.sum(1), ratio)


def takes_budget(selection: Selection) -> bool:
    """Whether a budget can be set."""
    try:
        selection.with_budget(1.0)
    except ValueError:
        return False
    return True


def matched(selection: Selector, layer_share: float, num_layers: int) -> Selector:
    """The selector with the ratio at which it spends ``layer_share`` of the context's layer-tokens.

    Layers that a method computes in full count: CacheBlend at a ratio of 15 % spends 22 % in a
    model of 12 layers. `Selection.spends` is matched to within `MATCHED`. Raises ValueError if no
    ratio spends that much, or the prompt decides what is spent.
    """

    def spends(ratio: float) -> float | None:
        return selection.with_budget(ratio).spends(num_layers)

    def unmet(spent: str) -> ValueError:
        return ValueError(
            f"a budget of {layer_share} of the layer-tokens cannot be met by {selection}: in a "
            f"model of {num_layers} layers it spends {spent}"
        )

    # A ratio of 0 runs nothing at all; from the smallest ratio on, the first layers run.
    least, most = spends(SMALLEST), spends(1.0)
    if least is None or most is None:
        raise unmet("what the prompt decides")
    if not least - MATCHED <= layer_share <= most + MATCHED:
        raise unmet(f"{least:.3f} to {most:.3f}")
    linear = min(1.0, max(0.0, (layer_share - least) / max(most - least, SMALLEST)))
    below, above = 0.0, 1.0  # not linear where whole layers are spent or shares are capped
    while above - below > SMALLEST:
        middle = (below + above) / 2
        below, above = (middle, above) if spends(middle) < layer_share else (below, middle)
    for ratio in (linear, below, above):
        if abs(spends(ratio) - layer_share) <= MATCHED:
            return selection.with_budget(ratio)
    raise unmet(f"{spends(below):.3f} or {spends(above):.3f}, and nothing between")
