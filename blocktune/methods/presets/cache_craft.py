"""Chunks from earlier full prompts, with statistics of what they leant on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from blocktune.methods import (
    Method,
    Selection,
    StoredContext,
    register,
    require_count,
    require_share,
)
from blocktune.prompt import LayoutSpec

if TYPE_CHECKING:
    from blocktune.cache import Recall


@register("cache-craft")
@dataclass(frozen=True)
class CacheCraft(Method):
    """Takes chunks from earlier full prompts and recomputes what leant on a context now missing.

    Of a chunk's variants the one is taken that needs the least computed again, by how much of its
    context returns, in order (CFO). A prompt is computed in full, and its chunks are remembered as
    they are in it, if no earlier one held one of them or if more than a share ``refresh`` of its
    tokens had to be computed again. So variants are always exact where they come from (the paper
    stores chunks of mixed prompts too). Of a chunk ``variants`` are kept; the least used is given
    up first (the paper weighs in what it cost). A budget takes the place of the share by CFO, of
    ``refresh`` and of early termination, which ``focus: 1`` switches off.

    ``rehearse`` gives a single question the history that it lives on: so many prompts of the same
    chunks, each turned by one place more.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2502.15734"
    alpha: float = 1.0
    refresh: float = 0.4
    variants: int = 5
    focus: float = 0.4
    hold: float = 0.8
    rehearse: int = 0

    def __post_init__(self):
        require_count("rehearse", self.rehearse)
        require_count("variants", self.variants, least=1)
        require_share("refresh", self.refresh)

    @property
    def recall(self) -> Recall:
        """See `Method`."""
        from blocktune.cache import Recall

        return Recall(self.refresh, self.variants, self.alpha)

    @property
    def exact_on_one_chunk(self) -> bool:
        """Else it may come from the middle of an earlier prompt, and only a share is made anew."""
        return self.recall.exact_alone

    def layout(self, spec: LayoutSpec) -> LayoutSpec:
        """Chunks after the blanks of their own earlier prompts, one after the other."""
        return replace(
            spec, block=True, num_blanks=0, shared_prefix=False, bos="none", placement="sequential"
        )

    def select(self) -> Selection:
        """By what is stored of the chunks."""
        return StoredContext(alpha=self.alpha, focus=self.focus, hold=self.hold)
