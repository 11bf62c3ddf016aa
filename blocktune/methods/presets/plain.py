"""Presets that decide how chunks are encoded, placed and attended to; naive reuse and bounds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from blocktune.methods import (
    Cached,
    Deviation,
    Everything,
    Method,
    Reshape,
    ScaledContext,
    Selection,
    TopChunks,
    Weights,
    register,
    require_count,
    require_one_of,
)
from blocktune.methods.base import encoded_alone
from blocktune.prompt import LayoutSpec

if TYPE_CHECKING:
    from blocktune.cache import ChunkStore
    from blocktune.cache.store.records import Recycler


class _InFull(Method):
    """Full attention, whatever the adapter was trained for."""

    cached: ClassVar[Cached] = Cached.NOTHING

    def layout(self, spec: LayoutSpec) -> LayoutSpec:
        return LayoutSpec(block=False)


@register("full-prefill")
class FullPrefill(_InFull):
    """Computes every token in full attention: the upper bound of accuracy and cost."""

    source: ClassVar[str] = "https://arxiv.org/abs/1706.03762"

    def select(self) -> Selection:
        return Everything()


@register("prefix-cache")
class PrefixCache(FullPrefill):
    """Reuses the longest prefix seen before, in the same order: exact, but rarely hit in RAG."""

    source: ClassVar[str] = "https://arxiv.org/abs/2312.07104"
    cached: ClassVar[Cached] = Cached.EXACT_PREFIX
    warm_up: int = 0

    def __post_init__(self):
        require_count("warm_up", self.warm_up)


@register("recycle")
class Recycle(PrefixCache):
    """Resumes from the nearest earlier prompt by sentence embedding if it is an exact prefix.

    The tokens of the nearest ``candidates`` are compared (the paper compares one). Prompts are kept
    as records of the chunk store. ``model`` is the embedding model.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2512.11851"
    model: str = "sentence-transformers/all-MiniLM-L6-v2"
    candidates: int = 1

    def __post_init__(self):
        super().__post_init__()
        require_count("candidates", self.candidates, least=1)

    def prefixes(self, store: ChunkStore, read: Callable[[Sequence[int]], str]) -> Recycler:
        from blocktune.cache.store.records import Embedder, Recycler

        embed = Embedder.of(store, self.model)
        key = ("recycle", self.model, self.candidates)
        return store.memoized(key, lambda: Recycler(store, read, embed, self.candidates))


@register("no-context")
class NoContext(_InFull):
    """Answers without any chunk: what the model knows or guesses, the lower bound."""

    source: ClassVar[str] = "https://arxiv.org/abs/2603.20218"
    keeps_context: ClassVar[bool] = False


@register("naive")
class Naive(Method):
    """Joins cached chunks, moved to their positions, and computes only the question."""

    source: ClassVar[str] = "https://arxiv.org/abs/2311.04934"


@register("link0")
class Link0(Method):
    """Encodes each chunk after blank tokens that absorb its attention sink and are then dropped.

    Nothing is recomputed. The source tunes the number of blanks in {1, 2, 3, 5, 10}.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2603.20218"
    blanks: int = 1

    def __post_init__(self):
        require_count("blanks", self.blanks, least=1)

    def layout(self, spec: LayoutSpec) -> LayoutSpec:
        return encoded_alone(spec, num_blanks=self.blanks)


@register("prompt-cache-schema")
class PromptCacheSchema(Method):
    """Places each chunk at the start of a reserved slot, so its positions are always the same.

    A schema of PromptCache reserves, for every module, the length of its longest alternative:
    ``slot`` tokens (the paper has no default); a longer chunk is refused. Unions, parameters and
    nested modules of its markup are not supported.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2311.04934"
    slot: int = 128

    def layout(self, spec: LayoutSpec) -> LayoutSpec:
        return replace(spec, block=True, placement="reserved", slot=self.slot)


@register("block-attention")
class BlockAttention(Method):
    """Reuses chunks without recomputation, on weights fine-tuned with block attention."""

    source: ClassVar[str] = "https://arxiv.org/abs/2409.15355"
    weights: ClassVar[Weights] = Weights.BLOCK


@register("kvlink")
class KVLink(Method):
    """Adds trained link tokens to each chunk, computed in context; nothing else is recomputed."""

    source: ClassVar[str] = "https://arxiv.org/abs/2502.16002"
    weights: ClassVar[Weights] = Weights.LINKS


PLACEMENTS = {"reordered": "sequential", "composite": "composite"}


@register("turborag")
class TurboRag(Method):
    """Reuses chunks encoded between trained document markers, without recomputation.

    The markers are the adapter's learned tokens. ``positions: reordered`` places the chunks one
    after another; ``composite`` leaves each where it was encoded, from position 0.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2410.07590"
    weights: ClassVar[Weights] = Weights.WRAPS
    positions: str = "reordered"

    def __post_init__(self):
        require_one_of("positions", self.positions, PLACEMENTS)

    def layout(self, spec: LayoutSpec) -> LayoutSpec:
        return replace(spec, placement=PLACEMENTS[self.positions], slot=0)


@register("kv-packet")
class KVPacket(Method):
    """Reuses chunks encoded between a learned header and trailer, without recomputation.

    The paper learns 8 tokens each by distillation and does not change the base model. Composed with
    a selector, a share is rounded up; KV Packet's baselines round it down.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2604.13226"
    weights: ClassVar[Weights] = Weights.WRAPS


@dataclass(frozen=True)
class _Scale(Method):
    temperature: float = 0.9
    scale: float = 0.9

    def reshape(self) -> Reshape:
        return ScaledContext(temperature=self.temperature, scale=self.scale)


@register("ape")
class Ape(_Scale):
    """Encodes chunks after a shared prefix at the same positions; scales attention to them.

    Every chunk starts where the prefix ends. The defaults are those of the authors' code; the paper
    searches a grid. ``positions: sequential`` places the chunks one after another, as
    arXiv:2603.20218 does.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2502.05431"
    positions: str = "parallel"

    def __post_init__(self):
        require_one_of("positions", self.positions, ("parallel", "sequential"))

    def layout(self, spec: LayoutSpec) -> LayoutSpec:
        return encoded_alone(spec, shared_prefix=True, placement=self.positions)


@register("sel")
class Sel(Method):
    """Encodes chunks after the shared prefix; the question sees only its top-scoring chunks.

    The defaults are the paper's for retrieved passages; see `TopChunks`. A single chunk is always
    seen, so it equals full prefill.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2412.16545"
    chunks: int = 2
    aggregation: str = "HT"

    def layout(self, spec: LayoutSpec) -> LayoutSpec:
        return encoded_alone(spec, shared_prefix=True)

    def reshape(self) -> Reshape:
        return TopChunks(chunks=self.chunks, aggregation=self.aggregation)


@register("s+p")
class SP(_Scale, Link0):
    """PSR's ablation S+P: encodes chunks after blanks and scales attention to them.

    Its other ablations are other methods: S is ``link0``, R ``cacheblend``, P+S+R ``psr``.
    """


@register("psr")
class Psr(SP):
    """Combines blanks before chunks, recomputation by key deviation, and scaled attention.

    The source recomputes 15 % and tunes the rest on a grid without reporting the result; the
    defaults here are one blank, and those of APE's code.
    """

    ratio: float = 0.15
    check_layer: int = 1

    def select(self) -> Selection:
        return Deviation(ratio=self.ratio, check_layer=self.check_layer)
