"""The interface of a repair: what is added to reused keys and values, from what was recomputed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from blocktune.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

REPAIRS = Registry("repair", "blocktune.methods.repair")
"""A file of ``repair/`` or a plug-in registers a class with ``@REPAIRS.register("name")``."""


class Residual(NamedTuple):
    """What one layer recomputed of the chunks, for its keys or for its values.

    Columns are those of the prompt, N of them; recomputed tokens are at theirs.
    """

    change: Tensor  # recomputed minus cached state, (B, K, N, D) float32, else 0
    recomputed: Tensor  # tokens that this layer recomputes, ``(B, N)`` bool
    reused: Tensor  # tokens whose cached state stays, ``(B, N)`` bool
    chunk: Tensor  # of each token, ``(B, N)``; -1 outside of chunks
    deviation: Tensor | None  # from the cached state at the check layer, (B, N)


class Repair(ABC):
    """Changes cached states from what is recomputed beside them; subclasses are frozen dataclasses.

    It is asked in every layer that recomputes some tokens of the chunks and reuses others, before
    any row attends there. Tokens before the first check layer of the selector are never repaired.
    """

    source: ClassVar[str] = ""  # paper or code it follows

    @abstractmethod
    def offset(self, seen: Residual) -> Tensor:
        """What is added to each column's cached state, ``(B, K, N, D)``; read where ``reused``.

        A chunk's offset may depend on this chunk's own tokens only: another one would make an
        earlier text depend on a later one.
        """
