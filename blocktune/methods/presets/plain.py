"""Presets that choose no tokens: full computation, plain reuse, and reuse on trained weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from blocktune.methods import (
    Cached,
    Everything,
    Method,
    Selection,
    Weights,
    register,
    require_count,
    require_one_of,
)
from blocktune.prompt import LayoutSpec


class _InFull(Method):
    """Full attention, whatever the adapter was trained for."""

    cached: ClassVar[Cached] = Cached.NOTHING

    def layout(self, spec: LayoutSpec) -> LayoutSpec:
        return LayoutSpec(block=False)


@register("full-prefill")
@dataclass(frozen=True)
class FullPrefill(_InFull):
    """Computes every token in full attention: the upper bound of accuracy and cost."""

    source: ClassVar[str] = "https://arxiv.org/abs/1706.03762"

    def select(self) -> Selection:
        return Everything()


@register("prefix-cache")
@dataclass(frozen=True)
class PrefixCache(_InFull):
    """Reuses the longest prefix seen before, in the same order: exact, but rarely hit in RAG.

    ``warm_up`` gives a single question a history: it first serves that many prompts of the same
    chunks, each rotated by one more place.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2312.07104"
    cached: ClassVar[Cached] = Cached.EXACT_PREFIX
    warm_up: int = 0

    def __post_init__(self):
        require_count("warm_up", self.warm_up)

    def select(self) -> Selection:
        return Everything()


@register("no-context")
@dataclass(frozen=True)
class NoContext(_InFull):
    """Answers without any chunk: what the model knows or guesses, the lower bound."""

    source: ClassVar[str] = "https://arxiv.org/abs/2603.20218"
    keeps_context: ClassVar[bool] = False
    exact_on_one_chunk: ClassVar[bool] = False


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
        return replace(spec, block=True, placement="reserved", slot=self.slot)


@register("block-attention")
@dataclass(frozen=True)
class BlockAttention(Method):
    """Reuses chunks without recomputation, on weights fine-tuned with block attention."""

    source: ClassVar[str] = "https://arxiv.org/abs/2409.15355"
    weights: ClassVar[Weights] = Weights.BLOCK


@register("kvlink")
@dataclass(frozen=True)
class KVLink(Method):
    """Adds trained link tokens to each chunk, computed in context; nothing else is recomputed."""

    source: ClassVar[str] = "https://arxiv.org/abs/2502.16002"
    weights: ClassVar[Weights] = Weights.LINKS
    # Links stand between the chunk and the question; a full prefill has none.
    exact_on_one_chunk: ClassVar[bool] = False


PLACEMENTS = {"reordered": "sequential", "composite": "composite"}


@register("turborag")
@dataclass(frozen=True)
class TurboRag(Method):
    """Reuses chunks encoded between trained document markers, without recomputation.

    The markers are the adapter's learned tokens, one before and one after each chunk.
    ``positions: reordered`` places the chunks one after another; ``composite`` leaves each where it
    was encoded, from position 0.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2410.07590"
    weights: ClassVar[Weights] = Weights.WRAPS
    # Markers stand around the chunk; a full prefill has none.
    exact_on_one_chunk: ClassVar[bool] = False
    positions: str = "reordered"

    def __post_init__(self):
        require_one_of("positions", self.positions, PLACEMENTS)

    def layout(self, spec: LayoutSpec) -> LayoutSpec:
        return replace(spec, placement=PLACEMENTS[self.positions])


@register("kv-packet")
@dataclass(frozen=True)
class KVPacket(Method):
    """Reuses chunks encoded between a learned header and trailer, without recomputation.

    Header and trailer are stored with the chunk and seen like its tokens. The paper learns 8 tokens
    each by distillation and does not change the base model. Composed with a selector, a share of
    n tokens is rounded up; KV Packet's baselines round it down (``int(ratio * n)``).
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2604.13226"
    weights: ClassVar[Weights] = Weights.WRAPS
    # Header and trailer stand around the chunk; a full prefill has none.
    exact_on_one_chunk: ClassVar[bool] = False
