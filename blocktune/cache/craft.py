"""Cache-Craft's arithmetic: how much of a chunk must be recomputed in a new context.

Source: Cache-Craft, arXiv:2502.15734. Names and order follow the paper.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

from blocktune.cache.variants import Ids, Variant


def cache_context_impact(variant: Variant, num_tokens: int) -> float:
    """CCI in [0.5, 1): how much the chunk leant on its context, against itself.

    ``1 / (1 + exp(-a / b))`` with ``a`` the attention per pair of tokens to the earlier chunks and
    ``b`` that within the chunk.

    Args:
        variant: Its statistics.
        num_tokens: Tokens of the chunk.
    """
    pairs = zip(variant.inter.tolist(), variant.context, strict=True)
    outside = sum(mass / (num_tokens * len(chunk)) for mass, chunk in pairs)
    inside = variant.intra / num_tokens**2
    if inside == 0:
        return 1.0 if outside > 0 else 0.5
    return 1 / (1 + math.exp(-outside / inside))


def prefix_overlap(variant: Variant, context: Sequence[Ids]) -> float:
    """Beta in [0, 1]: share of the attention to old chunks that goes to chunks still before it.

    1 where the variant paid no attention to any chunk: nothing can be missing.
    """
    total = sum(variant.inter.tolist())
    if total <= 0:
        return 1.0
    kept = set(context)
    pairs = zip(variant.inter.tolist(), variant.context, strict=True)
    return sum(mass for mass, chunk in pairs if chunk in kept) / total


def order_penalty(old: Sequence[Ids], new: Sequence[Ids]) -> float:
    """Gamma in [0, 1]: share of pairs of common chunks that stand the other way round (Kendall)."""
    place = {chunk: index for index, chunk in enumerate(new)}
    common = [place[chunk] for chunk in dict.fromkeys(old) if chunk in place]
    pairs = list(combinations(common, 2))
    return sum(left > right for left, right in pairs) / len(pairs) if pairs else 0.0


def cache_fix_overhead(
    variant: Variant, num_tokens: int, context: Sequence[Ids], alpha: float = 1.0
) -> float:
    """CFO in [0, 1]: share of the chunk's tokens to recompute after ``context``.

    ``alpha * CCI * (1 - beta * (1 - gamma))``; 0 where the chunk stands in the very context of
    the variant.

    Args:
        variant: Its statistics.
        num_tokens: Tokens of the chunk.
        context: Tokens of the chunks before it in the new prompt, in order.
        alpha: Found on validation data in the paper; 1 to begin with.
    """
    overlap = prefix_overlap(variant, context)
    overlap *= 1 - order_penalty(variant.context, context)
    impact = cache_context_impact(variant, num_tokens)
    return min(1.0, max(0.0, alpha * impact * (1 - overlap)))
