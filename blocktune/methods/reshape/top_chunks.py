"""Attention to the few chunks that matter most to a row."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from blocktune.methods.registry import RESHAPES
from blocktune.methods.reshape.base import Reshape, Seen, in_chunk

if TYPE_CHECKING:
    from torch import Tensor

    from blocktune.layout import Rows

AGGREGATIONS = ("none", "T", "HT", "LHT")
EVERY_CHUNK = 1 << 30


def chunk_scores(weights: Tensor, chunk: Tensor, num_chunks: int, top: int = 5) -> Tensor:
    """How much a row attends to each chunk: the sum of the chunk's largest probabilities.

    Args:
        weights: Attention probabilities, ``(B, H, R, N)``.
        chunk: Each column's chunk, ``(B, N)``; negative for columns of no chunk.
        num_chunks: C.
        top: Number of probabilities summed.

    Returns:
        ``(B, H, R, C)``.

    Source: arXiv:2412.16545, selective attention.
    """
    columns, exists = _members(chunk, num_chunks)
    shape = (*weights.shape[:3], -1)
    each = weights.gather(-1, columns.flatten(1)[:, None, None].expand(shape))
    each = each.unflatten(-1, columns.shape[1:]).masked_fill(~exists[:, None, None], 0.0)
    return each.topk(min(top, columns.shape[2]), dim=-1).values.sum(-1)


def _members(chunk: Tensor, num_chunks: int) -> tuple[Tensor, Tensor]:
    """Columns of each chunk, ``(B, C, longest)``, and which of them are not padding."""
    slots = chunk.where(chunk >= 0, num_chunks)
    counts = chunk.new_zeros(len(chunk), num_chunks + 1).scatter_add(1, slots, slots * 0 + 1)
    starts = (counts.cumsum(1) - counts)[:, :num_chunks, None]
    counts = counts[:, :num_chunks, None]
    place = _arange(max(1, int(counts.max())), chunk)
    index = (starts + place).clamp(max=chunk.shape[1] - 1)
    by_chunk = slots.argsort(dim=1, stable=True)
    return by_chunk.gather(1, index.flatten(1)).view_as(index), place < counts


def _arange(count: int, like: Tensor) -> Tensor:
    return like.new_ones(count).cumsum(0) - 1


@RESHAPES.register("top-chunks")
@dataclass(frozen=True)
class TopChunks(Reshape):
    """Hides all but the chunks that a row attends to most.

    A chunk's score is the sum of its five largest attention probabilities. Prefix, links, question
    and answer are never hidden, nor is the own chunk of a recomputed row. Recomputed tokens belong
    to their chunk. The rows of the question may sum their scores and choose together; a decoded or
    recomputed row chooses alone (with ``LHT`` it follows the question's choice).

    Attributes:
        chunks: Chunks that stay visible, at least 1.
        aggregation: What scores are summed over: ``none`` (each row and head decides alone), ``T``
            the question's rows, ``HT`` also heads, ``LHT`` also layers, from a pass of the question
            over the caches before the prefill.

    Raises:
        ValueError: If a value is not accepted.

    Source: arXiv:2412.16545, section 5.2; its default is ``HT`` with 2 chunks. It does not say what
    decoded rows do.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2412.16545"
    surveys: ClassVar[bool] = True
    exact_on_one_chunk: ClassVar[bool] = True
    chunks: int = 2
    aggregation: str = "HT"

    def __post_init__(self):
        if type(self.chunks) is not int or self.chunks < 1:
            raise ValueError(f"chunks must be a number of chunks, at least 1, got {self.chunks!r}")
        if self.aggregation not in AGGREGATIONS:
            known = ", ".join(AGGREGATIONS)
            raise ValueError(f"aggregation must be one of {known}, got {self.aggregation!r}")

    @property
    def keeps_causality(self) -> bool:
        """See `Reshape`: True if rows choose alone."""
        return self.aggregation == "none"

    @property
    def looks_ahead(self) -> bool:
        """See `Reshape`: scores of all layers take a pass of their own."""
        return self.aggregation == "LHT"

    def neutral(self) -> TopChunks:
        """See `Reshape.neutral`: every chunk stays visible."""
        return replace(self, chunks=EVERY_CHUNK)

    def acts(self, seen: Seen) -> bool:
        """See `Reshape.acts`."""
        return seen.num_chunks > 0

    def survey(self, scores: Tensor, seen: Seen) -> Tensor:
        """See `Reshape.survey`: each row's score of each chunk, ``(B, H, R, C)``."""
        chunk = seen.key.chunk.where(seen.in_chunk, -1)
        return chunk_scores(scores.softmax(dim=-1), chunk, seen.num_chunks)

    def choose(self, survey: Tensor, query: Rows) -> Tensor:
        """See `Reshape.choose`: which chunks a row keeps, ``(B, H or 1, R, C)`` bool."""
        from blocktune.layout import Kind

        survey = self._summed(survey, (query.kind == Kind.QUERY)[:, None, :, None])
        own = query.chunk.where(in_chunk(query), -1)[:, None, :, None]
        own = own == _arange(survey.shape[-1], query.chunk)
        ranked = survey.masked_fill(own, -1.0).argsort(dim=-1, descending=True, stable=True)
        return (ranked.argsort(dim=-1) < self.chunks) | own

    def _summed(self, survey: Tensor, asks: Tensor) -> Tensor:
        if self.aggregation == "none":
            return survey
        total = survey.masked_fill(~asks, 0.0).sum(2, keepdim=True)
        survey = total.where(asks, survey)
        return survey if self.aggregation == "T" else survey.sum(1, keepdim=True)

    def scores(self, scores: Tensor, seen: Seen, choice: Tensor) -> Tensor:
        """See `Reshape.scores`."""
        chunk = seen.key.chunk.clamp(min=0)[:, None, None]
        kept = choice.gather(-1, chunk.expand(*choice.shape[:3], -1))
        return scores.masked_fill_(seen.in_chunk[:, None, None] & ~kept, float("-inf"))
