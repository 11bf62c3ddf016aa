"""What a selector is, and the two that need no thought."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from blocktune.layout import Layout


class Selection(ABC):
    """Chooses context tokens to recompute, before the first layer and maybe once more.

    Attributes:
        check_layer: Layer (0-based) before whose attention `refine` is asked, given the keys
            that layer makes afresh and the cached ones; None when `start` is final. At layer 0
            keys do not depend on context yet, so it is at least 1.
    """

    check_layer: int | None = None

    @abstractmethod
    def start(self, layout: Layout) -> Tensor:
        """Tokens that are fresh from layer 0 on.

        Args:
            layout: Rows ``(B, S)``, nothing fresh yet.

        Returns:
            Bool ``(B, S)``, True only where ``layout.is_context``.
        """

    def refine(self, fresh: Tensor, cached: Tensor, eligible: Tensor, total: Tensor) -> Tensor:
        """Tokens that stay fresh from ``check_layer`` on; only called where there is one.

        Args:
            fresh: Keys made now, ``(B, K, R, D)``.
            cached: Keys of the same tokens as their chunks made them, relocated, like ``fresh``.
            eligible: Rows that are context tokens, ``(B, R)`` bool.
            total: Context tokens of each prompt, ``(B,)``.

        Returns:
            Bool ``(B, R)``, True only where ``eligible``.
        """
        raise AssertionError(f"{type(self).__name__} has no check layer to be asked at")


def selectable(layout: Layout) -> Tensor:
    """Context tokens whose cached state can differ from a full prefill, ``(B, S)`` bool.

    A chunk that opens the prompt saw all there was to see: its state is exact.
    """
    return layout.is_context & (layout.order - layout.offset > 0)


@dataclass(frozen=True)
class Nothing(Selection):
    """Recomputes no token: plain reuse."""

    def start(self, layout: Layout) -> Tensor:
        """See `Selection.start`."""
        return torch.zeros_like(layout.is_context)


@dataclass(frozen=True)
class Everything(Selection):
    """Recomputes every token: equals full prefill, the upper bound."""

    def start(self, layout: Layout) -> Tensor:
        """See `Selection.start`."""
        return layout.is_context
