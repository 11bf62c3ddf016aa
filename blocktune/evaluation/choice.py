"""Which tokens deviate most from full prefill, layer by layer, and how far layers agree on them.

Source: arXiv:2603.20218, observations 1, 2 and 4.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from blocktune.evaluation.probe import Deviation
from blocktune.methods.select import top_share

RATIO = 0.15
"""Share of the context tokens that counts as high, the default of CacheBlend and the study."""
FIRST_TOKENS = 8
"""Tokens of a chunk that count as its beginning."""


class Chosen(NamedTuple):
    """The tokens with the highest deviation in each layer.

    Attributes:
        deviation: Of keys, ``(L, T)``.
        top: Whether a token is among the highest of its layer, ``(L, T)`` bool.
        offset: Place of each token in its chunk, ``(T,)``.
        chunk: Chunk of each token, ``(T,)``.
    """

    deviation: NDArray[np.float64]
    top: NDArray[np.bool_]
    offset: NDArray[np.int64]
    chunk: NDArray[np.int64]


def chosen_tokens(away: Deviation, ratio: float) -> Chosen:
    """Ranks the tokens of a prompt by deviation, layer by layer; layer 0 chooses none.

    Args:
        away: What `deviation` measured for a method that keeps positions.
        ratio: Share of the context tokens that counts as high, in (0, 1].

    Raises:
        ValueError: If the method moves tokens, or the ratio is no such share.
    """
    if away.keys is None:
        raise ValueError(
            "this method puts chunks at other positions than full prefill, so their keys do not "
            "compare; choose one with sequential positions, such as 'naive' or 'link0'"
        )
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio must be a share in (0, 1], got {ratio}")
    keys = away.keys
    everywhere = keys.new_ones(keys.shape).bool()
    total = keys.new_full((len(keys),), keys.shape[1]).long()
    top = top_share(keys, everywhere, total, ratio)
    top[0] = False  # keys of layer 0 know no context: what differs there is rounding
    return Chosen(keys.double().numpy(), top.numpy(), away.offset.numpy(), away.chunk.numpy())


def overlap_of(chosen: Chosen) -> NDArray[np.float64]:
    """Share of the tokens chosen in layer i that are chosen in layer j too, ``(L, L)``."""
    top = chosen.top.astype(float)
    return (top @ top.T) / top.sum(1, keepdims=True).clip(1)


def cumulative_of(deviation: NDArray[np.float64]) -> NDArray[np.float64]:
    """Deviation accrued over tokens from the highest to the lowest, ``(L, T)``, not normalised."""
    return np.cumsum(-np.sort(-deviation, axis=1), axis=1)


def beginnings_of(chosen: Chosen) -> NDArray[np.float64]:
    """Share of each layer's choice that are first tokens of their chunk, ``(L,)``."""
    first = chosen.offset < FIRST_TOKENS
    return chosen.top[:, first].sum(1) / chosen.top.sum(1).clip(1)


def choice_of(away: Deviation, ratio: float = RATIO) -> dict[str, Any]:
    """What one prompt says of choosing tokens, as plain JSON types.

    Returns:
        ``beginnings``: of each layer's choice, the share that are first tokens of their chunk;
        ``first_share``: what it would be if any token were as likely. ``overlap``: see
        `overlap_of`. ``constant``: tokens that all layers but the first choose, of a layer's
        choice. ``accrued``: share of each layer's deviation that its choice holds.
    """
    chosen = chosen_tokens(away, ratio)
    high = np.where(chosen.top, chosen.deviation, 0).sum(1)
    return {
        "beginnings": beginnings_of(chosen).tolist(),
        "first_share": float((chosen.offset < FIRST_TOKENS).mean()),
        "overlap": overlap_of(chosen).tolist(),
        "constant": float(chosen.top[1:].all(0).sum() / max(1, chosen.top[-1].sum())),
        "accrued": (high / chosen.deviation.sum(1).clip(1e-12)).tolist(),
    }
