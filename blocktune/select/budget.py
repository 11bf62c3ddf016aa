"""How many tokens a share of a prompt is, and which ones score highest."""

from __future__ import annotations

import torch
from torch import Tensor


def require_share(name: str, value: float) -> None:
    """Refuses what is no share.

    Raises:
        ValueError: If ``value`` is not a number in [0, 1].
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"{name} must be a share of the context tokens in [0, 1], got {value!r}")


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
    # 0.15 * 20 is 3.0000000000000004 in floating point: not 4 tokens.
    count = torch.ceil(total.double() * ratio - 1e-9).long()
    ranked = scores.float().masked_fill(~eligible, float("-inf"))
    rank = ranked.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return eligible & (rank < count[:, None])
