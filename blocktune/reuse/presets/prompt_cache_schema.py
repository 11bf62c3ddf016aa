"""Chunks in reserved slots of positions."""

from dataclasses import dataclass, replace
from typing import ClassVar

from blocktune.prompt import LayoutSpec
from blocktune.reuse.base import Method, register


@register("prompt-cache-schema")
@dataclass(frozen=True)
class PromptCacheSchema(Method):
    """Places each chunk at the start of a reserved slot, so that positions never depend on others.

    PromptCache's schema reserves for every module the length of its longest alternative, and leaves
    the positions after a shorter one unused. ``slot`` is that length, in tokens (the paper has
    no default, it depends on the corpus); a longer chunk is refused.
    Of its markup only slots are here: no unions, parameters or nested modules.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2311.04934"
    # The question stands after the slot, not after the chunk.
    exact_on_one_chunk: ClassVar[bool] = False
    slot: int = 128

    def __post_init__(self):
        if type(self.slot) is not int or self.slot < 1:
            raise ValueError(f"slot must be a number of positions, at least 1, got {self.slot!r}")

    def arrange(self, spec: LayoutSpec) -> LayoutSpec:
        """A slot for every chunk."""
        return replace(spec, block=True, placement="reserved", slot=self.slot)
