"""The interface of a reshape: attention scores of rows over a cache, changed before softmax."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from blocktune.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

    from blocktune.layout import Rows

RESHAPES = Registry("reshape", "blocktune.methods.reshape")
"""A file of ``reshape/`` or a plug-in registers a class with ``@RESHAPES.register("name")``."""


class Seen(NamedTuple):
    """What a reshape knows about the scores that it gets.

    ``reused`` are the columns whose keys come from a cached chunk in this layer, ``(B, N)`` bool:
    not recomputed ones, nor prefix, links, question and answer.
    """

    query: Rows  # the attending rows, (B, R)
    key: Rows  # the columns, (B, N)
    reused: Tensor
    num_chunks: int  # C, the most of any prompt

    @property
    def in_chunk(self) -> Tensor:
        """Columns of chunks, reused or recomputed, ``(B, N)`` bool."""
        return in_chunk(self.key)


def in_chunk(rows: Rows) -> Tensor:
    """Tokens of chunks and the learned tokens around them, but not links."""
    from blocktune.layout import Kind

    return (rows.kind == Kind.CHUNK) | (rows.kind == Kind.WRAP)


class Reshape(ABC):
    """Changes attention scores before softmax; subclasses are frozen dataclasses.

    All scores are ``(B, H, R, N)`` float32, scaled and capped, with -inf where a row does not see a
    column (future, window, padding). Only rows over a cache are reshaped.

    If a reshape ``surveys``, `choose` decides from the `survey` of all rows, and `scores` gets the
    decision. If it ``looks_ahead``, the question is first computed once more, and every row gets
    the survey of that pass, summed over layers, heads and the question's rows.
    """

    source: ClassVar[str] = ""  # paper or code it follows
    surveys: ClassVar[bool] = False
    # False: the question's rows decide together, so its later tokens change its earlier rows.
    keeps_causality: bool = True
    looks_ahead: bool = False

    @abstractmethod
    def neutral(self) -> Reshape:
        """The same reshape with parameters that leave every score as it is."""

    @abstractmethod
    def scores(self, scores: Tensor, seen: Seen, choice: Tensor | None) -> Tensor:
        """The scores ``(B, H, R, N)`` to take softmax of; they may be changed in place.

        ``choice`` is what `choose` decided for these rows; None if the reshape does not survey.
        """

    def acts(self, seen: Seen) -> bool:
        """Whether any score of this layer can change; if not, a fused kernel attends."""
        return True

    def survey(self, scores: Tensor, seen: Seen) -> Tensor:
        """What `choose` needs from a block of rows before any is reshaped: ``(B, H, R, X)``.

        ``X`` is the same for all blocks; ``seen.key`` may lack columns that none of the rows sees.
        """
        raise AssertionError(f"{type(self).__name__} does not survey")

    def choose(self, survey: Tensor, query: Rows) -> Tensor:
        """Decides from the survey ``(B, H, R, X)`` of all rows; ``(B, H or 1, R, ...)``."""
        raise AssertionError(f"{type(self).__name__} does not choose")
