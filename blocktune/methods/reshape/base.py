"""What a reshape is: how later rows see reused keys, a few rows at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

from torch import Tensor

from blocktune.layout import Kind, Rows


class Seen(NamedTuple):
    """What a reshape is told about the scores it is given.

    Attributes:
        query: Facts of the seeing rows, ``(B, R)``.
        key: Facts of the columns, ``(B, N)``.
        reused: Columns of chunks whose keys come from a cache in this layer, ``(B, N)`` bool: not
            recomputed ones, nor prefix, links, question and answer.
        num_chunks: C, of the prompt with the most.
    """

    query: Rows
    key: Rows
    reused: Tensor
    num_chunks: int

    @property
    def in_chunk(self) -> Tensor:
        """Columns of chunks, reused or recomputed, ``(B, N)`` bool."""
        return in_chunk(self.key)


def in_chunk(rows: Rows) -> Tensor:
    """Tokens of chunks and what wraps them; the links beside them are not."""
    return (rows.kind == Kind.CHUNK) | (rows.kind == Kind.WRAP)


class Reshape(ABC):
    """Changes attention scores before softmax. Subclasses are frozen dataclasses in files here.

    All scores are ``(B, H, R, N)`` float32, scaled and capped, with -inf where a row does not see
    a column (future, window, padding). What is computed alone (a chunk while it is encoded) is
    never reshaped: only rows over a cache are.

    Class attributes:
        source: Paper or code it follows.
        surveys: Whether `scores` needs what `choose` decides from the `survey` of all rows.
        exact_on_one_chunk: Whether a chunk alone is seen as it is, whatever the parameters.
        keeps_causality: False where the rows of a question decide together, so that a later
            token of the question changes an earlier row of it (and never a row before it).

    Attributes:
        looks_ahead: Whether `choose` wants a survey of all layers before any is reshaped: the
            question is then computed once more ahead of the prefill, and every row gets its
            survey, summed over layers, heads and the question's rows.
    """

    source: ClassVar[str] = ""
    surveys: ClassVar[bool] = False
    exact_on_one_chunk: ClassVar[bool] = False
    keeps_causality: bool = True
    looks_ahead: bool = False

    @abstractmethod
    def neutral(self) -> Reshape:
        """The same reshape with parameters that leave every score as it is."""

    @abstractmethod
    def scores(self, scores: Tensor, seen: Seen, choice: Tensor | None) -> Tensor:
        """The scores that softmax shall be taken of; they may be changed in place.

        Args:
            scores: ``(B, H, R, N)``.
            seen: Whose they are.
            choice: What `choose` chose for these rows; None where nothing `surveys`.
        """

    def acts(self, seen: Seen) -> bool:
        """Whether anything of this layer can change; where not, a fused kernel attends."""
        return True

    def survey(self, scores: Tensor, seen: Seen) -> Tensor:
        """What must be known of a block of rows before any row is reshaped.

        Args:
            scores: ``(B, H, R, N)``, not to be changed.
            seen: Whose they are; ``seen.key`` may lack columns that none of the rows sees.

        Returns:
            ``(B, H, R, X)`` with an ``X`` that all blocks share.
        """
        raise AssertionError(f"{type(self).__name__} surveys nothing")

    def choose(self, survey: Tensor, query: Rows) -> Tensor:
        """What is decided from the survey ``(B, H, R, X)`` of all rows ``query`` ``(B, R)``.

        Returns:
            ``(B, H or 1, R, ...)``, handed to `scores` a block of rows at a time.
        """
        raise AssertionError(f"{type(self).__name__} chooses nothing")
