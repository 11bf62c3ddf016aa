"""Selection by another model's attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from blocktune.layout import Layout
from blocktune.select.base import Scored, selectable
from blocktune.select.budget import require_share, top_windows
from blocktune.select.passes import Passes
from blocktune.select.registry import SELECTORS


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
