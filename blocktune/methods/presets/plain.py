"""Reuse without training and without recomputation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from blocktune.methods import Method, register, require_count
from blocktune.prompt import LayoutSpec


@register("naive")
@dataclass(frozen=True)
class Naive(Method):
    """Joins cached chunks, moved to their positions, and computes only the question."""

    source: ClassVar[str] = "https://arxiv.org/abs/2311.04934"


@register("link0")
@dataclass(frozen=True)
class Link0(Method):
    """Encodes each chunk after blank tokens that absorb its attention sink and are then dropped.

    Nothing is recomputed. The study tunes the number of blanks in {1, 2, 3, 5, 10}.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2603.20218"
    # The chunk was encoded after blanks, which a full prefill does not have.
    exact_on_one_chunk: ClassVar[bool] = False
    blanks: int = 1

    def __post_init__(self):
        require_count("blanks", self.blanks, least=1)

    def layout(self, spec: LayoutSpec) -> LayoutSpec:
        """Chunks after blanks."""
        return replace(spec, block=True, shared_prefix=False, bos="none", num_blanks=self.blanks)


@register("prompt-cache-schema")
@dataclass(frozen=True)
class PromptCacheSchema(Method):
    """Places each chunk at the start of a reserved slot, so its positions are always the same.

    A schema of PromptCache reserves, for every module, the length of its longest alternative, and
    leaves the positions after a shorter one unused. ``slot`` is that length in tokens (it depends
    on the corpus; the paper has no default); a longer chunk is refused. Of its markup there are
    only slots: no unions, parameters or nested modules.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2311.04934"
    # The question starts after the slot, not after the chunk.
    exact_on_one_chunk: ClassVar[bool] = False
    slot: int = 128

    def __post_init__(self):
        require_count("slot", self.slot, least=1)

    def layout(self, spec: LayoutSpec) -> LayoutSpec:
        """A slot for every chunk."""
        return replace(spec, block=True, placement="reserved", slot=self.slot)
