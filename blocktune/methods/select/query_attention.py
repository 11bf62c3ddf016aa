"""Selection by what the question attends to, in the served model or in a smaller one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from blocktune.layout import Layout
from blocktune.methods.registry import SELECTORS
from blocktune.methods.select.base import Scored, selectable
from blocktune.methods.select.budget import require_share, top_share, top_windows
from blocktune.methods.select.passes import Passes

FUSIONS = ("mean", "max", "last")


@SELECTORS.register("query-attention")
@dataclass(frozen=True)
class QueryAttention(Scored):
    """The tokens that the question attends to most, when it is computed over the reused cache.

    Attributes:
        ratio: Share of the context tokens, in [0, 1].
        fuse: How the layers' scores become one: their ``mean``, their ``max``, or the ``last``
            layer's alone. The papers' formulas are not public.

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
        total = layout.is_context.sum(1)
        return top_share(fused, selectable(layout), total, self.ratio)


@SELECTORS.register("auxiliary-attention")
@dataclass(frozen=True)
class AuxiliaryAttention(Scored):
    """Windows of tokens that the question attends to most in a small model's last layer.

    Attributes:
        ratio: Share of the context tokens, in [0, 1]; the last window may go beyond it.
        model: Folder or repository name of a model with the same tokenizer; ``self`` is the served
            model, which bounds what an auxiliary one can tell and costs a full prefill.
        window: Tokens of a window, 1 or more. The paper's is not public.

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
        return top_windows(scores, layout, selectable(layout), self.ratio, self.window)
