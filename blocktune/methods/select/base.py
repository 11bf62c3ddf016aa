"""What a selector is, and the two that need no thought."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from typing import ClassVar

import torch
from torch import Tensor

from blocktune.layout import Kind, Layout
from blocktune.methods.registry import SELECTORS
from blocktune.methods.select.layer_check import LayerCheck
from blocktune.methods.select.passes import Passes


class Selection(ABC):
    """Chooses context tokens to recompute: before the first layer, and again where it says so.

    A simple selector is its `start`. One that reads scores overrides `begin`, one that narrows
    on the way up `checks` and `refine`, one that widens `widens` and `widen`.

    Class attributes:
        source: Paper or code it follows; empty for the two bounds.
        watches_chunks: Whether `refine` reads what the question paid each chunk.

    Attributes:
        keeps_keys: Whether rows that `refine` drops leave the keys and values in that layer that
            were made to judge them (the authors' CacheBlend), or the cached ones (the study's).
        sees_future: Reproduces the mask of CacheBlend's code, in which row ``r`` of ``R`` computed
            rows sees all but the last ``R - 1 - r`` columns. Not a way to serve.
    """

    source: ClassVar[str] = ""
    watches_chunks: ClassVar[bool] = False
    keeps_keys: bool = False
    sees_future: bool = False

    def with_budget(self, ratio: float) -> Selection:
        """The same selector when it may choose a share of the context tokens.

        Methods are compared at one budget through this, and the contracts ask for the two ends:
        0 selects nothing, 1 everything. A selector whose share has another name than ``ratio``
        says so by overriding it.

        Raises:
            ValueError: If it has no budget to set, or ``ratio`` is no share.
        """
        if "ratio" not in {field.name for field in fields(self)}:
            raise ValueError(
                f"selector '{SELECTORS.name_of(self)}' takes no budget; leave the budget out"
            )
        return replace(self, ratio=ratio)

    def spends(self, num_layers: int) -> float | None:
        """Share of the context's layer-tokens it will compute, or None if the prompt decides.

        Preceding passes and probes are not in it; an answer's usage has what was executed.
        """
        return getattr(self, "ratio", None)

    @property
    def min_layers(self) -> int:
        """Layers that a model must have for it."""
        return 1

    @abstractmethod
    def start(self, layout: Layout) -> Tensor:
        """Tokens that are fresh from layer 0 on.

        Args:
            layout: Rows ``(B, S)``, nothing fresh yet.

        Returns:
            Bool ``(B, S)``, True only where ``layout.is_context``.
        """

    def begin(self, layout: Layout, passes: Passes) -> Tensor:
        """`start`, for those that ask a model first; what the engine calls."""
        return self.start(layout)

    def checks(self, num_layers: int) -> tuple[int, ...]:
        """Layers (0-based, rising) at whose entry `refine` drops rows.

        Keys of layer 0 do not depend on context: what compares keys begins at 1.
        """
        return ()

    def refine(self, check: LayerCheck) -> Tensor:
        """Rows that stay fresh from ``check.layer`` on.

        Returns:
            Bool ``(B, R)``, True only where ``check.eligible``.
        """
        raise AssertionError(f"{type(self).__name__} has no check layer to be asked at")

    def widens(self, num_layers: int) -> tuple[int, ...]:
        """Layers (0-based) at whose entry `widen` adds rows; no layer is also a check.

        A row that is added starts from what its chunk carried into that layer, which is stored
        when the chunk is encoded.
        """
        return ()

    def widen(self, layer: int, layout: Layout) -> Tensor:
        """Tokens that are fresh from ``layer`` on besides those that are; bool ``(B, S)``."""
        return selectable(layout)


class Scored(Selection):
    """A selector whose choice needs a model to run first."""

    def start(self, layout: Layout) -> Tensor:
        """Refused: there is nothing to choose by.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            f"selector '{SELECTORS.name_of(self)}' chooses by a pass over a served prompt; where "
            "there is none (in training), use 'first-k' or 'random'"
        )

    @abstractmethod
    def begin(self, layout: Layout, passes: Passes) -> Tensor:
        """See `Selection.begin`."""


def selectable(layout: Layout) -> Tensor:
    """Context tokens whose cached state can differ from a full prefill, ``(B, S)`` bool.

    A chunk that opens the prompt saw all there was to see: its state is exact, unless it was
    encoded after blanks.
    """
    blanks = (layout.kind == Kind.BLANK).any(dim=1, keepdim=True)
    return layout.is_context & ((layout.order - layout.offset > 0) | blanks)


@SELECTORS.register("nothing")
@dataclass(frozen=True)
class Nothing(Selection):
    """Recomputes no token: plain reuse."""

    def spends(self, num_layers: int) -> float:
        """See `Selection.spends`."""
        return 0.0

    def start(self, layout: Layout) -> Tensor:
        """See `Selection.start`."""
        return torch.zeros_like(layout.is_context)


@SELECTORS.register("everything")
@dataclass(frozen=True)
class Everything(Selection):
    """Recomputes every token: equals full prefill, the upper bound."""

    def spends(self, num_layers: int) -> float:
        """See `Selection.spends`."""
        return 1.0

    def start(self, layout: Layout) -> Tensor:
        """See `Selection.start`."""
        return layout.is_context
