"""How many tokens a share of a prompt is, and which ones score highest."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from blocktune.layout import Layout
from blocktune.methods.select.base import Selection

MATCHED = 0.005
"""Shares of layer-tokens that differ by no more are the same budget."""
SMALLEST = 1e-9
"""A ratio above 0 that chooses no token."""
Selector = TypeVar("Selector", bound=Selection)


def require_share(name: str, value: float) -> None:
    """Refuses what is no share.

    Raises:
        ValueError: If ``value`` is not a number in [0, 1].
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"{name} must be a share of the context tokens in [0, 1], got {value!r}")


def require_layer(name: str, value: int, least: int, why: str) -> None:
    """Refuses what is no layer from ``least`` on.

    Raises:
        ValueError: Saying ``why``.
    """
    if type(value) is not int or value < least:
        raise ValueError(f"{name} must be a layer from {least} on ({why}), got {value!r}")


def share_count(total: Tensor, ratio: float) -> Tensor:
    """Whole tokens that a share of ``total`` ``(B,)`` is, rounded up."""
    # 0.15 * 20 is 3.0000000000000004 in floating point: not 4 tokens.
    return torch.ceil(total.double() * ratio - 1e-9).long()


def top_count(scores: Tensor, eligible: Tensor, count: Tensor) -> Tensor:
    """The ``count`` ``(B,)`` highest-scoring tokens of each prompt; of equals, the earlier one.

    Args:
        scores: ``(B, R)``, higher is chosen first.
        eligible: Rows that may be chosen, ``(B, R)`` bool.
        count: Tokens to choose, ``(B,)``.

    Returns:
        Bool ``(B, R)``.
    """
    ranked = scores.float().masked_fill(~eligible, float("-inf"))
    rank = ranked.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return eligible & (rank < count[:, None])


def top_share(scores: Tensor, eligible: Tensor, total: Tensor, ratio: float) -> Tensor:
    """The highest-scoring share of each prompt's tokens; of equals, the earlier one.

    Args:
        scores: ``(B, R)``, higher is chosen first.
        eligible: Rows that may be chosen, ``(B, R)`` bool.
        total: Tokens that ``ratio`` is a share of, per prompt, ``(B,)``.
        ratio: In [0, 1]; rounded up to whole tokens.

    Returns:
        Bool ``(B, R)``.
    """
    return top_count(scores, eligible, share_count(total, ratio))


def top_windows(scores: Tensor, layout: Layout, eligible: Tensor, ratio: float, window: int):
    """Whole windows of consecutive tokens of a chunk, by mean score, until the share is reached.

    Args:
        scores: ``(B, S)``, rows of the layout.
        layout: Rows, for chunks and offsets.
        eligible: Rows that may be chosen, ``(B, S)`` bool.
        ratio: Share of the context tokens; the last window may go beyond it.
        window: Tokens of a window; the last of a chunk may be shorter.

    Returns:
        Bool ``(B, S)``.
    """
    per_chunk = int(layout.offset.max()) // window + 1
    group = layout.chunk.clamp(min=0) * per_chunk + layout.offset // window
    zeros = scores.new_zeros(len(scores), int(group.max()) + 1)
    size = zeros.scatter_add(1, group, eligible.to(scores.dtype))
    mean = zeros.scatter_add(1, group, scores * eligible) / size.clamp(min=1)
    order = mean.masked_fill(size == 0, float("-inf")).argsort(dim=1, descending=True, stable=True)
    before = size.gather(1, order).cumsum(1) - size.gather(1, order)
    taken = before < share_count(layout.is_context.sum(1), ratio)[:, None]
    chosen = torch.zeros_like(taken).scatter(1, order, taken)
    return eligible & chosen.gather(1, group)


def takes_budget(selection: Selection) -> bool:
    """Whether it can be told how much to spend."""
    try:
        selection.with_budget(1.0)
    except ValueError:
        return False
    return True


def matched(selection: Selector, layer_share: float, num_layers: int) -> Selector:
    """The selector at the ratio with which it spends ``layer_share`` of the context's layer-tokens.

    Layers that a method computes in full count: CacheBlend at a ratio of 15 % in a model of 12
    layers spends 22 %. What is matched is what `Selection.spends` says, to `MATCHED`.

    Raises:
        ValueError: If it spends more, or less, at any ratio, or the prompt decides what it spends.
    """

    def spends(ratio: float) -> float | None:
        return selection.with_budget(ratio).spends(num_layers)

    # Without any budget nothing runs at all; from the smallest one on, the first layers do.
    least, most = spends(SMALLEST), spends(1.0)
    if least is None or most is None:
        raise ValueError(_unmet(selection, layer_share, num_layers, "what the prompt decides"))
    if not least - MATCHED <= layer_share <= most + MATCHED:
        found = f"{least:.3f} to {most:.3f}"
        raise ValueError(_unmet(selection, layer_share, num_layers, found))
    ratio = min(1.0, max(0.0, (layer_share - least) / max(most - least, SMALLEST)))
    if not _near(spends(ratio), layer_share):  # it does not grow evenly: whole layers, or capped
        below, ratio = _around(spends, layer_share)
        ratio = below if _near(spends(below), layer_share) else ratio
        if not _near(spends(ratio), layer_share):
            found = f"{spends(below):.3f} or {spends(ratio):.3f}, and nothing between"
            raise ValueError(_unmet(selection, layer_share, num_layers, found))
    return selection.with_budget(ratio)


def _near(spent: float, wanted: float) -> bool:
    return abs(spent - wanted) <= MATCHED


def _around(spends: Callable[[float], float], wanted: float) -> tuple[float, float]:
    """Two ratios side by side: the lower spends less than ``wanted``, the other as much or more."""
    below, above = 0.0, 1.0
    while above - below > SMALLEST:
        middle = (below + above) / 2
        below, above = (middle, above) if spends(middle) < wanted else (below, middle)
    return below, above


def _unmet(selection: Selection, layer_share: float, num_layers: int, spends: str) -> str:
    return (
        f"a budget of {layer_share} of the layer-tokens cannot be met by {selection}: in a "
        f"model of {num_layers} layers it spends {spends}"
    )
