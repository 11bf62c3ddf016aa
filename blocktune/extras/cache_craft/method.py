"""The method, its selector and its history of earlier prompts."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from blocktune.methods import (
    SELECTORS,
    Method,
    PromptHistory,
    Scored,
    Selection,
    register,
    require_count,
    require_share,
    selectable,
    top_count,
    top_of_context,
)
from blocktune.prompt import LayoutSpec

if TYPE_CHECKING:
    from torch import Tensor

    from blocktune.cache import ChunkStore
    from blocktune.extras.cache_craft.variants import Ids
    from blocktune.layout import Layout
    from blocktune.methods import LayerCheck, Passes, PrefilledBatch
    from blocktune.prompt import Pieces


@dataclass(frozen=True)
class VariantHistory(PromptHistory):
    """Serves every chunk from its best variant, and stores those of prompts computed in full.

    Attributes:
        refresh: Compute a prompt in full if a greater share of its chunks' tokens would be
            recomputed.
        most: Variants kept of one chunk.
        alpha: Of `cache_fix_overhead`.
    """

    refresh: float
    most: int
    alpha: float

    @property
    def exact_alone(self) -> bool:
        """See `PromptHistory`: the least fix overhead of a chunk with lost context is alpha / 2."""
        return self.refresh < self.alpha / 2

    def without_selection(self) -> VariantHistory:
        """See `PromptHistory`: only a chunk without a variant makes a prompt full."""
        return replace(self, refresh=1.0)

    def lookup(self, store: ChunkStore, fingerprint: str, pieces: Pieces) -> list[Ids] | None:
        """See `PromptHistory`."""
        from blocktune.extras.cache_craft.variants import VariantStore

        variants, chunks = VariantStore.of(store, fingerprint), pieces.chunks
        found = [variants.best(c, chunks[:i], self.alpha) for i, c in enumerate(chunks)]
        if None in found:
            return None
        fresh = sum(best.overhead * len(c) for best, c in zip(found, chunks, strict=True))
        if fresh > self.refresh * sum(map(len, chunks)):
            return None
        contexts = [best.variant.blanks for best in found]
        for chunk, blanks in zip(chunks, contexts, strict=True):
            variants.used(chunk, blanks)
        return contexts

    def update(self, store: ChunkStore, fingerprint: str, batch: PrefilledBatch) -> None:
        """See `PromptHistory`; prompts served from caches teach nothing."""
        import torch

        from blocktune.cache import ChunkKV, key_after
        from blocktune.extras.cache_craft.variants import Variant, VariantStore
        from blocktune.layout import GLOBAL, Kind

        variants, columns = VariantStore.of(store, fingerprint), batch.columns
        for index, prompt in enumerate(batch.pieces):
            blanks = prompt.prefix
            for number, chunk in enumerate(prompt.chunks):
                own = (columns.chunk[index] == number) & (columns.kind[index] == Kind.CHUNK)
                if int(columns.group[index][own][0]) != GLOBAL:
                    break
                kv = ChunkKV(
                    keys=tuple(layer.keys[index][:, own] for layer in batch.cache.layers),
                    values=tuple(layer.values[index][:, own] for layer in batch.cache.layers),
                    token_ids=torch.tensor(chunk),
                    fingerprint=fingerprint,
                    origin=len(blanks),
                ).compact()
                store.put(key_after(fingerprint, chunk, blanks), kv)
                paid = batch.chunk_attention[index, own].cpu()
                variant = Variant(
                    prefix=prompt.prefix,
                    context=prompt.chunks[:number],
                    inter=paid[:, :number].sum(0),
                    tokens=paid[:, :number].sum(1),
                    intra=float(paid[:, number].sum()),
                )
                variants.learn(chunk, variant, self.most)
                blanks = blanks + chunk


@SELECTORS.register("stored-context")
@dataclass(frozen=True)
class StoredContext(Scored):
    """The tokens of each chunk that attended most to the context it was first computed in.

    How many: the chunk's fix overhead (`cache_fix_overhead`); a chunk of which nothing is known
    is computed in full. After a share ``focus`` of the layers, the chunks that the question does
    not attend to are dropped.

    Attributes:
        alpha: Factor of the fix overhead.
        ratio: Share of the context tokens instead of the fix overhead, or None.
        focus: Share of the layers after which chunks are dropped; 1: never.
        hold: The chunks that hold this share of the question's attention stay.

    Raises:
        ValueError: If a value is out of range.

    Source: Cache-Craft arXiv:2502.15734. It says that for most questions the focused chunks are
    clear after 10 to 15 of 32 layers, and not what makes one focused: ``hold`` is ours.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2502.15734"
    watches_chunks: ClassVar[bool] = True
    needs_question: ClassVar[bool] = True
    alpha: float = 1.0
    ratio: float | None = None
    focus: float = 0.4
    hold: float = 0.8

    def __post_init__(self):
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, int | float):
            raise ValueError(f"alpha must be a number of at least 0, got {self.alpha!r}")
        if not 0 <= self.alpha < math.inf:
            raise ValueError(f"alpha must be a number of at least 0, got {self.alpha!r}")
        for name in ("focus", "hold"):
            require_share(name, getattr(self, name))
        if self.ratio is not None:
            require_share("ratio", self.ratio)

    def with_budget(self, ratio: float) -> StoredContext:
        """See `Selection.with_budget`; all of the budget is spent, in every layer."""
        return replace(self, ratio=ratio, focus=1.0)

    def begin(self, layout: Layout, passes: Passes) -> Tensor:
        """See `Selection.begin`."""
        overhead, tokens = self._stored(passes)
        if self.ratio is not None:
            return top_of_context(tokens, layout, self.ratio)
        chosen = layout.is_context & False
        for chunk in range(int(layout.chunk.max()) + 1):
            own = selectable(layout) & (layout.chunk == chunk)
            share = overhead.where(own, 0.0).amax(1)
            wanted = (share.double() * own.sum(1) - 1e-9).ceil()
            chosen |= top_count(tokens, own, wanted)
        return chosen

    def _stored(self, passes: Passes) -> tuple[Tensor, Tensor]:
        """Each row's fix overhead, and what its token paid its old context, ``(B, S)`` both."""
        from blocktune.extras.cache_craft.variants import VariantStore, cache_fix_overhead
        from blocktune.layout import Kind

        layout = passes.batch.layout
        variants = VariantStore.of(passes.store, passes.fingerprint)
        tokens = (layout.kind * 0).float()
        overhead = tokens + 1
        for index, prompt in enumerate(passes.pieces):
            for number, chunk in enumerate(prompt.chunks):
                own = layout.chunk[index] == number
                blanks = passes.batch.input_ids[index, own & (layout.kind[index] == Kind.BLANK)]
                variant = variants.find(chunk, tuple(blanks.tolist()))
                if variant is None:
                    continue
                rows = own & layout.is_context[index]
                context = prompt.chunks[:number]
                overhead[index, rows] = cache_fix_overhead(variant, len(chunk), context, self.alpha)
                tokens[index, rows] = variant.tokens.to(tokens.device)
        return overhead, tokens

    def checks(self, num_layers: int) -> tuple[int, ...]:
        """See `Selection.checks`."""
        layer = math.ceil(self.focus * num_layers - 1e-9)
        return (layer,) if 0 < layer < num_layers else ()

    def refine(self, check: LayerCheck) -> Tensor:
        """See `Selection.refine`: keeps the chunks that hold most of the question's attention."""
        mass, most = check.question_mass.sort(dim=1, descending=True)
        before = mass.cumsum(1) - mass
        stays = before < self.hold * mass.sum(1, keepdim=True)
        focused = (stays & False).scatter(1, most, stays)
        return check.eligible & focused.gather(1, check.chunk.clamp(min=0))


@register("cache-craft")
@dataclass(frozen=True)
class CacheCraft(Method):
    """Takes chunks from earlier full prompts; recomputes what depended on context now missing.

    Of a chunk's variants it takes the one with the least to recompute, by how much of its context
    returns, in order (CFO). A prompt is computed in full if no variant of a chunk is known, or if
    more than a share ``refresh`` of its tokens would be recomputed; its chunks are then stored as
    they are in it. So a variant is always exact where it comes from (the paper stores chunks of
    mixed prompts too). ``variants`` of a chunk are kept; the least used leaves first (the paper
    also weighs its cost). A budget replaces the share by CFO, ``refresh`` and early termination,
    which ``focus: 1`` switches off.

    ``warm_up`` gives a single question a history: that many prompts of the same chunks before it,
    each rotated by one chunk more.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2502.15734"
    alpha: float = 1.0
    refresh: float = 0.4
    variants: int = 5
    focus: float = 0.4
    hold: float = 0.8
    warm_up: int = 0

    def __post_init__(self):
        require_count("warm_up", self.warm_up)
        require_count("variants", self.variants, least=1)
        require_share("refresh", self.refresh)

    @property
    def history(self) -> VariantHistory:
        """See `Method`."""
        return VariantHistory(self.refresh, self.variants, self.alpha)

    @property
    def exact_on_one_chunk(self) -> bool:
        """Else it may come from the middle of an earlier prompt, and only a share is recomputed."""
        return self.history.exact_alone

    def layout(self, spec: LayoutSpec) -> LayoutSpec:
        """Chunks after the blanks of their own earlier prompts, one after the other."""
        return replace(
            spec, block=True, num_blanks=0, shared_prefix=False, bos="none", placement="sequential"
        )

    def select(self) -> Selection:
        """By what is stored of the chunks."""
        return StoredContext(alpha=self.alpha, focus=self.focus, hold=self.hold)
