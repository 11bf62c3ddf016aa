"""Selection by how far a token's key is from what a full prefill would have made."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from blocktune.layout import Layout
from blocktune.select.base import Selection, selectable
from blocktune.select.budget import require_share, top_share


def key_deviation(fresh: Tensor, cached: Tensor) -> Tensor:
    """Mean over heads of the Euclidean distance between fresh and cached keys.

    Args:
        fresh: ``(B, K, R, D)``.
        cached: ``(B, K, R, D)``, at the same positions.

    Returns:
        ``(B, R)`` float32.

    Source: arXiv:2603.20218, section 4.1 (delta K).
    """
    return (fresh.float() - cached.float()).norm(dim=-1).mean(dim=1)


@dataclass(frozen=True)
class KeyDeviation(Selection):
    """All tokens up to ``check_layer``; from there on the share whose keys deviate most.

    Attributes:
        ratio: Share of the context tokens that stays fresh, in [0, 1].
        check_layer: Layer (0-based) whose keys are compared. The layers below are computed in
            full; those of the layer itself are made for all tokens, but used for the chosen.

    Raises:
        ValueError: If the ratio is no share, or the check layer is 0, where keys of all
            contexts are the same and every deviation is 0.

    Source: CacheBlend arXiv:2405.16444, in the form of arXiv:2603.20218.
    """

    ratio: float = 0.15
    check_layer: int = 1

    def __post_init__(self):
        require_share("ratio", self.ratio)
        if type(self.check_layer) is not int or self.check_layer < 1:
            raise ValueError(
                f"check_layer must be a layer from 1 on (at layer 0 keys do not depend on the "
                f"context yet, so nothing deviates), got {self.check_layer!r}"
            )

    def start(self, layout: Layout) -> Tensor:
        """See `Selection.start`."""
        return selectable(layout)

    def refine(self, fresh: Tensor, cached: Tensor, eligible: Tensor, total: Tensor) -> Tensor:
        """See `Selection.refine`."""
        return top_share(key_deviation(fresh, cached), eligible, total, self.ratio)
