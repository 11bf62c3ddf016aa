"""Cache-Craft: chunks from earlier full prefills, and statistics that decide what to recompute."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from blocktune.methods import (
    SELECTORS,
    Method,
    Scored,
    Selection,
    register,
    require_count,
    require_share,
    selectable,
    top_by_chunk,
    top_of_context,
)
from blocktune.methods.base import encoded_alone
from blocktune.prompt import LayoutSpec

if TYPE_CHECKING:
    from torch import Tensor

    from blocktune.extras.cache_craft.variants import VariantHistory
    from blocktune.layout import Layout
    from blocktune.methods import LayerCheck, Passes


@SELECTORS.register("stored-context")
class StoredContext(Scored):
    """The tokens of each chunk that attended most to the context it was first computed in.

    Their share is `cache_fix_overhead`, or all without statistics. After a share ``focus`` of the
    layers, the chunks that the question does not attend to are dropped.

    Source: Cache-Craft arXiv:2502.15734 (they are clear after 10 to 15 of 32 layers); its rule for
    when a chunk is attended to is unknown: ``hold`` is ours.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2502.15734"
    watches_chunks: ClassVar[bool] = True
    needs_question: ClassVar[bool] = True
    alpha: float = 1.0  # factor of the fix overhead
    ratio: float | None = None  # share of the context tokens instead of the fix overhead, or None
    focus: float = 0.4  # share of the layers after which chunks are dropped; 0 or 1: never
    hold: float = 0.8  # chunks stay that together hold this share of the question's attention

    def __post_init__(self):
        super().__post_init__()
        require_share("focus", self.focus)
        require_share("hold", self.hold)
        if not 0 <= self.alpha < math.inf:
            raise ValueError(f"alpha must be a number of at least 0, got {self.alpha!r}")

    def with_budget(self, ratio: float) -> StoredContext:
        return replace(self, ratio=ratio, focus=1.0)

    def begin(self, layout: Layout, passes: Passes) -> Tensor:
        overhead, tokens = self._stored(passes)
        if self.ratio is not None:
            return top_of_context(tokens, layout, self.ratio)
        own = selectable(layout)
        return top_by_chunk(tokens, own, layout.chunk, own, overhead)

    def _stored(self, passes: Passes) -> tuple[Tensor, Tensor]:
        """Each row's fix overhead, and its attention to the old context, both ``(B, S)``."""
        import torch

        from blocktune.extras.cache_craft.variants import VariantStore, cache_fix_overhead
        from blocktune.layout import Kind

        layout = passes.batch.layout
        variants = VariantStore.of(passes.store, passes.fingerprint)
        tokens = torch.zeros(layout.kind.shape, device=layout.device)
        overhead = torch.ones_like(tokens)
        for index, prompt in enumerate(passes.pieces):
            for number, chunk in enumerate(prompt.chunks):
                own = layout.chunk[index] == number
                blanks = passes.batch.input_ids[index, own & (layout.kind[index] == Kind.BLANK)]
                if variant := variants.find(chunk, tuple(blanks.tolist())):
                    rows = own & layout.is_context[index]
                    inputs = variant, len(chunk), prompt.chunks[:number], self.alpha
                    overhead[index, rows] = cache_fix_overhead(*inputs)
                    tokens[index, rows] = variant.tokens.to(tokens.device)
        return overhead, tokens

    def checks(self, num_layers: int) -> tuple[int, ...]:
        layer = math.ceil(self.focus * num_layers - 1e-9)
        return (layer,) if 0 < layer < num_layers else ()

    def refine(self, check: LayerCheck) -> Tensor:
        mass, ranking = check.question_mass.sort(dim=1, descending=True)
        before = mass.cumsum(1) - mass
        stays = before < self.hold * mass.sum(1, keepdim=True)
        focused = stays.gather(1, ranking.argsort(dim=1))  # back in the order of the chunks
        return check.eligible & focused.gather(1, check.chunk.clamp(min=0))


@register("cache-craft")
class CacheCraft(Method):
    """Takes chunks from earlier full prompts; recomputes what depended on context now missing.

    Each chunk is taken from the variant with the smallest share to recompute (CFO), by how much of
    its old context precedes it again, in order. Context is chunks: the prefix is taken to be the
    same in all prompts. A prompt is computed in full if a chunk has no variant, or if more than a
    share ``refresh`` of its tokens would be recomputed; its chunks are then stored, so a variant is
    exact in its own prompt (the paper stores those of mixed prompts too). ``variants`` of a chunk
    are kept; the least used is dropped first (the paper also weighs its cost). A budget replaces
    CFO, ``refresh`` and early termination, which ``focus: 1`` switches off.
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
        from blocktune.extras.cache_craft.variants import VariantHistory

        return VariantHistory(self.refresh, self.variants, self.alpha)

    def layout(self, spec: LayoutSpec) -> LayoutSpec:
        return encoded_alone(spec, placement="sequential")

    def select(self) -> Selection:
        return StoredContext(alpha=self.alpha, focus=self.focus, hold=self.hold)
