"""Selectors by attention: what the question attends to, or whose own attention context changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from blocktune.methods.registry import SELECTORS
from blocktune.methods.select.base import Scored
from blocktune.methods.select.budget import require_share, top_of_context, top_windows

if TYPE_CHECKING:
    from torch import Tensor

    from blocktune.layout import Layout
    from blocktune.methods.select.passes import Passes

FUSIONS = ("mean", "max", "last")


@SELECTORS.register("query-attention")
@dataclass(frozen=True)
class QueryAttention(Scored):
    """The tokens that the question attends to most when it is computed over the reused cache.

    Attributes:
        ratio: Share of the context tokens, in [0, 1].
        fuse: How scores of the layers are combined: ``mean``, ``max``, or only the ``last`` layer.
            The papers' formulas are not public.

    Raises:
        ValueError: If a value is out of range.

    Source: ProphetKV arXiv:2602.02579 (two stages, layers fused into one set).
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2602.02579"
    needs_question: ClassVar[bool] = True
    ratio: float = 0.15
    fuse: str = "mean"

    def __post_init__(self):
        require_share("ratio", self.ratio)
        if self.fuse not in FUSIONS:
            raise ValueError(f"fuse must be {', '.join(FUSIONS)}, got {self.fuse!r}")

    def begin(self, layout: Layout, passes: Passes) -> Tensor:
        """See `Selection.begin`."""
        layers = passes.query_attention()
        fused = {"mean": layers.mean(0), "max": layers.amax(0), "last": layers[-1]}[self.fuse]
        return top_of_context(fused, layout, self.ratio)


@SELECTORS.register("auxiliary-attention")
@dataclass(frozen=True)
class AuxiliaryAttention(Scored):
    """Windows of tokens that the question attends to most in the last layer of a small model.

    Attributes:
        ratio: Share of the context tokens, in [0, 1]; the last window may exceed it.
        model: Folder or repository name of a model with the same tokenizer. ``self`` is the served
            model: an upper bound for any auxiliary model, at the cost of a full prefill.
        window: Tokens per window, 1 or more. The paper's value is not public.

    Raises:
        ValueError: If a value is out of range.

    Source: CacheClip arXiv:2510.10129.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2510.10129"
    needs_question: ClassVar[bool] = True
    ratio: float = 0.15
    model: str = "self"
    window: int = 8

    def __post_init__(self):
        require_share("ratio", self.ratio)
        if type(self.window) is not int or self.window < 1:
            raise ValueError(f"window must be a number of tokens, at least 1, got {self.window!r}")

    def begin(self, layout: Layout, passes: Passes) -> Tensor:
        """See `Selection.begin`."""
        scores = passes.auxiliary_attention(self.model)
        return top_windows(scores, layout, self.ratio, self.window)


@SELECTORS.register("attention-deviation")
@dataclass(frozen=True)
class AttentionDeviation(Scored):
    """The tokens whose first-layer attention changes most when they see the other chunks.

    Attributes:
        ratio: Share of the context tokens, in [0, 1].

    Raises:
        ValueError: If the ratio is out of range.

    Source: "selective reconstruction", one of the texts that blocktune began from, which gives no
    formula; ours is the total variation between a token's attention alone and in context.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2603.20218"
    ratio: float = 0.15

    def __post_init__(self):
        require_share("ratio", self.ratio)

    def begin(self, layout: Layout, passes: Passes) -> Tensor:
        """See `Selection.begin`."""
        return top_of_context(passes.outside_attention(), layout, self.ratio)
