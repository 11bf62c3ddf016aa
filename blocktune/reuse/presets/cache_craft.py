"""Chunks from earlier full prompts, with statistics of what they leant on."""

from dataclasses import dataclass, replace
from typing import ClassVar

from blocktune.prompt import LayoutSpec
from blocktune.reuse.base import Method, register, require_count
from blocktune.select import Selection, StoredContext


@register("cache-craft")
@dataclass(frozen=True)
class CacheCraft(Method):
    """Takes chunks from earlier full prompts and recomputes what leant on a context now missing.

    Of a chunk's variants the one is taken that needs the least computed again, by how much of its
    context returns, in order (CFO). A prompt with a chunk that no earlier one held is computed in
    full, and all its chunks are remembered; so variants are always exact where they come from (the
    paper also stores chunks of mixed prompts), and none is added once all chunks are known. The
    least used is given up first (the paper weighs in what it cost). A budget takes the place of
    both the share by CFO and early termination, which ``focus: 1`` switches off.

    ``rehearse`` gives a single question the history that it lives on: so many prompts of the same
    chunks, each turned by one place more.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2502.15734"
    recalls: ClassVar[bool] = True
    # It may come from the middle of an earlier prompt, and only a share of it is computed again.
    exact_on_one_chunk: ClassVar[bool] = False
    alpha: float = 1.0
    focus: float = 0.4
    hold: float = 0.8
    rehearse: int = 0

    def __post_init__(self):
        require_count("rehearse", self.rehearse)

    def arrange(self, spec: LayoutSpec) -> LayoutSpec:
        """Chunks after the ghosts of their own earlier prompts, one after the other."""
        return replace(
            spec, block=True, num_ghosts=0, shared_prefix=False, bos="none", placement="sequential"
        )

    def selection(self) -> Selection:
        """By what is stored of the chunks."""
        return StoredContext(alpha=self.alpha, focus=self.focus, hold=self.hold)
