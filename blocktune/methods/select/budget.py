"""Converts shares to numbers of tokens, takes the best-scoring tokens, and equalises costs."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from blocktune.methods.select.base import Selection, selectable

if TYPE_CHECKING:
    from torch import Tensor

    from blocktune.layout import Layout

MATCHED = 0.005
"""Largest difference of two shares of layer-tokens that count as equal."""
SMALLEST = 1e-9
"""A ratio above 0 so small that it selects no token."""
Selector = TypeVar("Selector", bound=Selection)


def share_count(total: Tensor, ratio: float | Tensor) -> Tensor:
    """Whole tokens in a share of ``total`` tokens, rounded up; of any shape."""
    # 0.15 * 20 is 3.0000000000000004 in floating point: not 4 tokens.
    return (total.double() * ratio - 1e-9).ceil().long()


def top_count(scores: Tensor, eligible: Tensor, count: Tensor) -> Tensor:
    """The ``count`` ``(B,)`` highest-scoring tokens of each prompt, bool ``(B, R)``.

    Equal scores: the earlier token. ``scores`` ``(B, R)``; ``eligible`` may be chosen, bool.
    """
    ranked = scores.float().masked_fill(~eligible, float("-inf"))
    rank = ranked.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return eligible & (rank < count[:, None])


def top_share(scores: Tensor, eligible: Tensor, total: Tensor, ratio: float) -> Tensor:
    """As `top_count`, for the share ``ratio`` of ``total`` ``(B,)`` tokens, rounded up."""
    return top_count(scores, eligible, share_count(total, ratio))


def top_of_context(scores: Tensor, layout: Layout, ratio: float) -> Tensor:
    """As `top_share`, for a share of the context tokens; one score for each row of the layout."""
    return top_share(scores, selectable(layout), layout.is_context.sum(1), ratio)


def chunk_sizes(chunk: Tensor, member: Tensor) -> Tensor:
    """How many rows of each row's chunk are a ``member``; all are ``(B, R)``, the result int64."""
    slots = chunk.clamp(min=0)
    counts = slots.new_zeros(len(slots), int(slots.max()) + 1)
    return counts.scatter_add(1, slots, member.long()).gather(1, slots)


def top_by_chunk(
    scores: Tensor, eligible: Tensor, chunk: Tensor, counted: Tensor, ratio: float | Tensor
) -> Tensor:
    """As `top_count` in each chunk, for a share of its ``counted`` tokens, rounded up.

    All are ``(B, R)``; ``chunk`` is the index of each row's chunk, ``ratio`` may differ by chunk.
    """
    import torch

    order = scores.float().masked_fill(~eligible, float("-inf"))
    order = order.argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, chunk.gather(1, order).argsort(dim=1, stable=True))
    first = torch.searchsorted(chunk.gather(1, order), chunk.contiguous())  # of its chunk
    count = share_count(chunk_sizes(chunk, counted), ratio)
    return eligible & (order.argsort(dim=1) - first < count)


def takes_budget(selection: Selection) -> bool:
    """Whether the selector takes a budget."""
    try:
        selection.with_budget(1.0)
    except ValueError:
        return False
    return True


def matched(selection: Selector, layer_share: float, num_layers: int) -> Selector:
    """The selector with the ratio at which it spends ``layer_share`` of the context's layer-tokens.

    `Selection.spends` is matched to within `MATCHED`. Raises ValueError if no ratio spends that
    much, or the share depends on the prompt.
    """

    def spends(ratio: float) -> float | None:
        return selection.with_budget(ratio).spends(num_layers)

    def unmet(spent: str) -> ValueError:
        return ValueError(
            f"a budget of {layer_share} of the layer-tokens cannot be met by {selection}: in a "
            f"model of {num_layers} layers it spends {spent}"
        )

    # A ratio of 0 computes nothing; any larger one may compute the first layers in full.
    least, most = spends(SMALLEST), spends(1.0)
    if least is None or most is None:
        raise unmet("what the prompt decides")
    if not least - MATCHED <= layer_share <= most + MATCHED:
        raise unmet(f"{least:.3f} to {most:.3f}")
    linear = min(1.0, max(0.0, (layer_share - least) / max(most - least, SMALLEST)))
    below, above = 0.0, 1.0  # bisection, since whole layers and capped shares are not linear
    while above - below > SMALLEST:
        middle = (below + above) / 2
        below, above = (middle, above) if spends(middle) < layer_share else (below, middle)
    for ratio in (linear, below, above):
        if abs(spends(ratio) - layer_share) <= MATCHED:
            return selection.with_budget(ratio)
    raise unmet(f"{spends(below):.3f} or {spends(above):.3f}, and nothing between")
