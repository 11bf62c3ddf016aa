"""Moves every token of a chunk by the mean change of its few recomputed tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from blocktune.methods.repair.base import REPAIRS, Repair, Residual
from blocktune.methods.select.budget import top_by_chunk
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

    The paper does not say whether keys are averaged before or after rotation; here after, as they
    are cached. It has no public code.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2607.21604"  # AgentKVShift, algorithm 1
    share: float = 0.1

    def __post_init__(self):
        require_share("share", self.share)

    def offset(self, seen: Residual) -> Tensor:
        import torch

        chunk, probes = seen.chunk, seen.recomputed
        if seen.deviation is not None:
            probes = top_by_chunk(seen.deviation, probes, chunk, chunk >= 0, self.share)
        # As products of matrices: a loop over the chunks would pass over all columns for each.
        chunks = torch.arange(int(chunk.max()) + 1, device=chunk.device)
        member = (chunk[:, None] == chunks[:, None]).to(seen.change.dtype)  # (B, C, N)
        share = torch.nn.functional.normalize(member * probes[:, None], p=1, dim=-1)
        total = member.mT[:, None] @ (share[:, None] @ seen.change)
        if seen.deviation is None:
            return total
        return total * seen.deviation.clamp(max=1)[:, None, :, None]
