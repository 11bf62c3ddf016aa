"""Moves every token of a chunk by the mean change of its few recomputed tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from blocktune.methods.repair.base import REPAIRS, Repair, Residual
from blocktune.methods.select.budget import share_count, top_count
from blocktune.registry import require_share

if TYPE_CHECKING:
    from torch import Tensor


@REPAIRS.register("mean-shift")
class MeanShift(Repair):
    """Adds to a chunk's reused states the mean change of its recomputed ones, layer by layer.

    The mean is over the recomputed tokens that deviate most, up to ``share`` of the chunk's tokens
    (rounded up), separately for keys and values. A token that deviates by less than 1 at the check
    layer gets that fraction of the mean. Without a check layer, the mean is over all recomputed
    tokens, and every reused token gets all of it.

    Source: AgentKVShift arXiv:2607.21604, algorithm 1. It has no public code and does not say
    whether keys are averaged before or after rotation; here after, as they are cached.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2607.21604"
    share: float = 0.1

    def __post_init__(self):
        require_share("share", self.share)

    def offset(self, seen: Residual) -> Tensor:
        import torch

        total = torch.zeros_like(seen.change)
        for chunk in range(int(seen.chunk.max()) + 1):
            own = seen.chunk == chunk
            probes = own & seen.recomputed
            if seen.deviation is not None:
                count = share_count(own.sum(1), self.share)
                probes = top_count(seen.deviation, probes, count)
            number = probes.sum(1).clamp(min=1)[:, None, None]
            mean = (seen.change * probes[:, None, :, None]).sum(2) / number
            total += mean[:, :, None] * own[:, None, :, None]
        if seen.deviation is None:
            return total
        return total * seen.deviation.clamp(max=1)[:, None, :, None]
