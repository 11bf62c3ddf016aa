"""The interface of a selector, and the two trivial ones: nothing and everything."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, ClassVar

from blocktune.methods.registry import SELECTORS

if TYPE_CHECKING:
    from torch import Tensor

    from blocktune.layout import Layout
    from blocktune.methods.select.layer_check import LayerCheck
    from blocktune.methods.select.passes import Passes


class Selection(ABC):
    """Chooses the context tokens to recompute; subclasses are frozen dataclasses.

    A simple selector only defines `start`. One that needs scores overrides `begin`, one that drops
    tokens at deeper layers `checks` and `refine`, one that adds tokens there `widens` and `widen`.

    Class attributes:
        source: Paper or code it follows; empty for the two trivial selectors.
        watches_chunks: Whether `refine` reads the question's attention to each chunk.
        needs_question: Whether the choice depends on the question; a cache of the context then
            serves this question alone.

    Attributes:
        keeps_keys: What a row that `refine` drops leaves in the cache at that layer: the keys and
            values just computed to compare it (CacheBlend's code), or the cached ones.
        sees_future: Reproduces the mask of CacheBlend's code, in which row ``r`` of ``R`` computed
            rows sees all but the last ``R - 1 - r`` columns. Do not serve with it.
    """

    source: ClassVar[str] = ""
    watches_chunks: ClassVar[bool] = False
    needs_question: ClassVar[bool] = False
    keeps_keys: bool = False
    sees_future: bool = False

    def with_budget(self, ratio: float) -> Selection:
        """The same selector with a share of the context tokens to spend.

        Methods are compared at equal budgets through this, and the contract tests use both ends:
        0 selects nothing, 1 everything. Override it if the share is not the field ``ratio``.

        Raises:
            ValueError: If it has no budget, or ``ratio`` is not in [0, 1].
        """
        if "ratio" not in {field.name for field in fields(self)}:
            raise ValueError(
                f"selector '{SELECTORS.name_of(self)}' takes no budget; leave the budget out"
            )
        return replace(self, ratio=ratio)

    def spends(self, num_layers: int) -> float | None:
        """Share of the context's layer-tokens that it recomputes; None if the prompt decides.

        Scoring passes and probes do not count here; an answer's usage counts all that was executed.
        """
        return getattr(self, "ratio", None)

    @property
    def min_layers(self) -> int:
        """Smallest number of layers that a model must have."""
        return 1

    @abstractmethod
    def start(self, layout: Layout) -> Tensor:
        """Tokens that are recomputed from layer 0 on.

        Args:
            layout: Rows ``(B, S)``, nothing recomputed yet.

        Returns:
            Bool ``(B, S)``, True only where ``layout.is_context``.
        """

    def begin(self, layout: Layout, passes: Passes) -> Tensor:
        """What the engine calls: `start`, or for a scored selector a choice from ``passes``."""
        return self.start(layout)

    def checks(self, num_layers: int) -> tuple[int, ...]:
        """Layers (0-based, rising) at whose entry `refine` drops rows.

        Keys of layer 0 do not depend on context, so comparing keys makes sense from layer 1 on.
        """
        return ()

    def refine(self, check: LayerCheck) -> Tensor:
        """Rows that are still recomputed from ``check.layer`` on.

        Returns:
            Bool ``(B, R)``, True only where ``check.eligible``.
        """
        raise AssertionError(f"{type(self).__name__} has no check layer")

    def widens(self, num_layers: int) -> tuple[int, ...]:
        """Layers (0-based) at whose entry `widen` adds rows; none of them is in `checks`.

        An added row starts from the hidden state that was stored when its chunk was encoded.
        """
        return ()

    def widen(self, layer: int, layout: Layout) -> Tensor:
        """Tokens that are also recomputed from ``layer`` on; bool ``(B, S)``."""
        return selectable(layout)


class Scored(Selection):
    """A selector that needs scores from a forward pass first; it defines `begin`."""

    def start(self, layout: Layout) -> Tensor:
        """Refused: there are no scores.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            f"selector '{SELECTORS.name_of(self)}' needs a forward pass over a served prompt; "
            "where there is none (in training), use 'first-k' or 'random'"
        )

    @abstractmethod
    def begin(self, layout: Layout, passes: Passes) -> Tensor:
        """See `Selection.begin`."""


def selectable(layout: Layout) -> Tensor:
    """Context tokens whose cached state can differ from a full prefill, ``(B, S)`` bool.

    A chunk at the very start of the prompt has seen all there is to see: its state is exact, unless
    it was encoded after blanks.
    """
    from blocktune.layout import Kind

    blanks = (layout.kind == Kind.BLANK).any(dim=1, keepdim=True)
    return layout.is_context & ((layout.order - layout.offset > 0) | blanks)


@SELECTORS.register("nothing")
@dataclass(frozen=True)
class Nothing(Selection):
    """Recomputes no token: naive reuse."""

    def spends(self, num_layers: int) -> float:
        """See `Selection.spends`."""
        return 0.0

    def start(self, layout: Layout) -> Tensor:
        """See `Selection.start`."""
        return layout.is_context & False


@SELECTORS.register("everything")
@dataclass(frozen=True)
class Everything(Selection):
    """Recomputes every context token: equal to full prefill, the upper bound."""

    def spends(self, num_layers: int) -> float:
        """See `Selection.spends`."""
        return 1.0

    def start(self, layout: Layout) -> Tensor:
        """See `Selection.start`."""
        return layout.is_context
