"""Repairs: reused keys and values are corrected without being computed. Tensors in and out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from blocktune.methods.select.budget import top_by_chunk
from blocktune.registry import Registry, require_share

if TYPE_CHECKING:
    from torch import Tensor

REPAIRS = Registry("repair", "blocktune.methods.repair")
"""This file or a plug-in registers a class with ``@REPAIRS.register("name")``."""


class Residual(NamedTuple):
    """What recomputing some tokens of the chunks changed in a layer, for its keys or its values."""

    change: Tensor  # recomputed minus cached state, (B, K, N, D) float32; 0 if not recomputed
    recomputed: Tensor  # tokens that this layer recomputes, (B, N) bool
    reused: Tensor  # tokens whose cached state stays, (B, N) bool
    chunk: Tensor  # index of each token's chunk, (B, N); -1 outside of chunks
    deviation: Tensor | None  # distance from the cached state at the check layer, (B, N)


class Repair(ABC):
    """Corrects cached states by the recomputed ones; subclasses are frozen dataclasses.

    It is called, before rows attend, in every layer that recomputes some tokens of the chunks.
    """

    source: ClassVar[str] = ""  # paper or code it follows

    @abstractmethod
    def offset(self, seen: Residual) -> Tensor:
        """The offset to add to each column's cached state, ``(B, K, N, D)``; read where ``reused``.

        It may depend only on tokens of the same chunk, so that no text depends on a later one.
        """


@REPAIRS.register("mean-shift")
class MeanShift(Repair):
    """Adds to a chunk's reused states the mean change of its recomputed ones, layer by layer.

    The mean is over the recomputed tokens that deviate most, up to ``share`` of the chunk's tokens
    (rounded up), separately for keys and values. A token that deviates by less than 1 at the check
    layer gets that fraction of the mean. Without a check layer, the mean is over all recomputed
    tokens, and every reused token gets all of it. Keys are averaged after rotation, as they are
    cached (the paper does not say, and has no public code).
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
