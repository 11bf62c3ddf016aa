"""Plain reuse: nothing is trained and nothing recomputed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from blocktune.methods.base import Method, register
from blocktune.prompt import LayoutSpec


@register("naive")
@dataclass(frozen=True)
class Naive(Method):
    """Joins chunk caches, moved to their positions, and computes only the question."""

    source: ClassVar[str] = "https://arxiv.org/abs/2311.04934"


@register("link0")
@dataclass(frozen=True)
class Link0(Method):
    """Encodes each chunk after blanks, whose keys take the attention sink and are dropped.

    Nothing is recomputed. The study tunes the number of blanks in {1, 2, 3, 5, 10}.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2603.20218"
    # The chunk was encoded after blanks, which a full prefill does not have.
    exact_on_one_chunk: ClassVar[bool] = False
    blanks: int = 1

    def __post_init__(self):
        if type(self.blanks) is not int or self.blanks < 1:
            raise ValueError(f"blanks must be a number of tokens, at least 1, got {self.blanks!r}")

    def layout(self, spec: LayoutSpec) -> LayoutSpec:
        """Chunks after blanks."""
        return replace(spec, block=True, shared_prefix=False, bos="none", num_blanks=self.blanks)


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

    def layout(self, spec: LayoutSpec) -> LayoutSpec:
        """A slot for every chunk."""
        return replace(spec, block=True, placement="reserved", slot=self.slot)
