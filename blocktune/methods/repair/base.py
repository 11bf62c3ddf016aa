"""The interface of a repair: an offset for reused states, derived from recomputed ones."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from blocktune.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

REPAIRS = Registry("repair", "blocktune.methods.repair")
"""A file of ``repair/`` or a plug-in registers a class with ``@REPAIRS.register("name")``."""


class Residual(NamedTuple):
    """What recomputing some tokens of the chunks changed in one layer, for its keys or its values.

    N is the number of the prompt's columns.
    """

    change: Tensor  # recomputed minus cached state, (B, K, N, D) float32; 0 if not recomputed
    recomputed: Tensor  # tokens that this layer recomputes, (B, N) bool
    reused: Tensor  # tokens whose cached state stays, (B, N) bool
    chunk: Tensor  # index of each token's chunk, (B, N); -1 outside of chunks
    deviation: Tensor | None  # distance from the cached state at the check layer, (B, N)


class Repair(ABC):
    """Corrects cached states by the recomputed ones; subclasses are frozen dataclasses.

    It is called in every layer that recomputes some tokens of the chunks and reuses others, before
    any row attends there.
    """

    source: ClassVar[str] = ""  # paper or code it follows

    @abstractmethod
    def offset(self, seen: Residual) -> Tensor:
        """The offset to add to each column's cached state, ``(B, K, N, D)``; read where ``reused``.

        It may depend only on tokens of the same chunk, so that no text depends on a later one.
        """
