"""Selection by what is stored of a chunk: which of its tokens leant on a context that is gone."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from blocktune.methods.registry import SELECTORS
from blocktune.methods.select.base import Scored, selectable
from blocktune.methods.select.budget import require_share, top_count, top_of_context

if TYPE_CHECKING:
    from torch import Tensor

    from blocktune.layout import Layout
    from blocktune.methods.select.layer_check import LayerCheck
    from blocktune.methods.select.passes import Passes


@SELECTORS.register("stored-context")
@dataclass(frozen=True)
class StoredContext(Scored):
    """Of each chunk the tokens that attended most to its old context, as many as that is missed.

    How many is the chunk's fix overhead (`blocktune.cache.cache_craft`); a chunk of which nothing
    is known is computed in full. On the way up, the chunks that the question does not look at are
    given up.

    Attributes:
        alpha: Factor of the fix overhead.
        ratio: Share of the context tokens instead of the fix overhead, or None.
        focus: Share of the layers after which chunks are given up; 1 never gives any up.
        hold: The chunks that hold this share of the question's attention stay.

    Raises:
        ValueError: If a value is out of range.

    Source: Cache-Craft arXiv:2502.15734. It says that for most questions the focused chunks are
    clear after 10 to 15 of 32 layers, and not what makes one focused: ``hold`` is ours.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2502.15734"
    watches_chunks: ClassVar[bool] = True
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
        stored = passes.stored_context(self.alpha)
        if self.ratio is not None:
            return top_of_context(stored.tokens, layout, self.ratio)
        chosen = layout.is_context & False
        for chunk in range(int(layout.chunk.max()) + 1):
            own = selectable(layout) & (layout.chunk == chunk)
            share = stored.overhead.where(own, 0.0).amax(1)
            wanted = (share.double() * own.sum(1) - 1e-9).ceil()
            chosen |= top_count(stored.tokens, own, wanted)
        return chosen

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
