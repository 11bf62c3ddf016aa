"""Reused keys in a softmax of their own, with a temperature and a scale (APE)."""

from __future__ import annotations

from dataclasses import replace
from math import inf
from typing import TYPE_CHECKING, ClassVar

from blocktune.methods.reshape.base import RESHAPES, Reshape, Seen

if TYPE_CHECKING:
    from torch import Tensor


@RESHAPES.register("scaled-context")
class ScaledContext(Reshape):
    """Gives reused keys a softmax of their own, with a temperature and a scale.

    Let ``lse_c`` be the log-sum-exp of a row's scores over reused keys divided by ``temperature``,
    and ``lse_o`` that over all other keys, recomputed ones included. The two outputs are averaged
    by ``softmax([scale * temperature * lse_c, lse_o])``. This equals one softmax in which each
    reused key's score is ``score / temperature + (scale * temperature - 1) * lse_c``.

    Source: APE arXiv:2502.05431 and its code; recomputed keys are treated as in arXiv:2603.20218,
    section 5. With soft-capping, the capped scores are divided.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2502.05431"
    temperature: float = 0.9  # above 0; below 1 sharpens attention among the reused keys
    scale: float = 0.9  # above 0; the weight of reused keys against the others

    def __post_init__(self):
        for name in ("temperature", "scale"):
            value = getattr(self, name)
            if type(value) is bool or not isinstance(value, int | float) or not 0 < value < inf:
                raise ValueError(f"{name} must be a number above 0, got {value!r}; 1 is neutral")

    def neutral(self) -> ScaledContext:
        return replace(self, temperature=1.0, scale=1.0)

    def acts(self, seen: Seen) -> bool:
        return bool(seen.reused.any())

    def scores(self, scores: Tensor, seen: Seen, choice: Tensor | None) -> Tensor:
        reused = seen.reused[:, None, None]
        cooled = scores / self.temperature
        lse = cooled.masked_fill(~reused, float("-inf")).logsumexp(-1, keepdim=True)
        lse = lse.masked_fill(lse == float("-inf"), 0.0)  # a row that sees no reused key
        return (cooled + (self.scale * self.temperature - 1) * lse).where(reused, scores)
