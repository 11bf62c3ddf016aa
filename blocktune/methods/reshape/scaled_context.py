"""Reused keys in a softmax of their own: sharper by a temperature, weighted by a scale."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from blocktune.methods.registry import RESHAPES
from blocktune.methods.reshape.base import Reshape, Seen


@RESHAPES.register("scaled-context")
@dataclass(frozen=True)
class ScaledContext(Reshape):
    """Merges attention over reused keys, made with a temperature and scaled, with all other.

    With ``lse_c`` the log-sum-exp of a row's scores over reused keys divided by ``temperature``
    and ``lse_o`` that over all other keys, the two outputs are averaged by
    ``softmax([scale * temperature * lse_c, lse_o])``. Recomputed keys, which have seen all before
    them, are among the others. That average is one softmax in which each reused key's score is
    ``score / temperature + (scale * temperature - 1) * lse_c``, and this is how it is executed.

    Attributes:
        temperature: Above 0; below 1 sharpens attention among the reused keys.
        scale: Above 0; with the temperature it scales what reused keys weigh against the others.

    Raises:
        ValueError: If a value is not above 0.

    Source: APE arXiv:2502.05431 and its code; which keys are scaled beside recomputed ones is
    arXiv:2603.20218, section 5. Under soft-capping the capped scores are divided.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2502.05431"
    temperature: float = 0.9
    scale: float = 0.9

    def __post_init__(self):
        for name in ("temperature", "scale"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise ValueError(f"{name} must be a number above 0, got {value!r}; 1 is neutral")

    def neutral(self) -> ScaledContext:
        """See `Reshape.neutral`."""
        return replace(self, temperature=1.0, scale=1.0)

    def acts(self, seen: Seen) -> bool:
        """See `Reshape.acts`: where all is recomputed, nothing is scaled."""
        return bool(seen.reused.any())

    def scores(self, scores: Tensor, seen: Seen, choice: Tensor | None) -> Tensor:
        """See `Reshape.scores`."""
        reused = seen.reused[:, None, None]
        cooled = scores / self.temperature
        lse = cooled.masked_fill(~reused, float("-inf")).logsumexp(-1, keepdim=True)
        lse = lse.masked_fill(lse == float("-inf"), 0.0)  # a row that sees no reused key
        return torch.where(reused, cooled + (self.scale * self.temperature - 1) * lse, scores)
