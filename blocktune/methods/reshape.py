"""Reshapes: attention scores of rows over a cache are changed before softmax."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from math import inf
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from blocktune.registry import Registry, require_count, require_one_of

if TYPE_CHECKING:
    from torch import Tensor

    from blocktune.layout import Rows

RESHAPES = Registry("reshape", "blocktune.methods.reshape")
"""This file or a plug-in registers a class with ``@RESHAPES.register("name")``."""
EVERY_CHUNK = 1 << 30


class Seen(NamedTuple):
    """What a reshape knows about the scores that it gets."""

    query: Rows  # the attending rows, (B, R)
    key: Rows  # the columns, (B, N)
    reused: Tensor  # columns whose keys come from a cached chunk in this layer, (B, N) bool
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


@RESHAPES.register("scaled-context")
class ScaledContext(Reshape):
    """Gives reused keys a softmax of their own, with a temperature and a scale.

    Let ``lse`` be the log-sum-exp of a row's scores over reused keys divided by ``temperature``.
    Each reused key's score becomes ``score / temperature + (scale * temperature - 1) * lse``.

    Source: APE arXiv:2502.05431 and its code; recomputed keys are treated as in arXiv:2603.20218,
    section 5. With soft-capping, the capped scores are divided.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2502.05431"
    temperature: float = 0.9  # above 0; below 1 sharpens attention among the reused keys
    scale: float = 0.9  # above 0; the weight of reused keys against the others

    def __post_init__(self):
        for name in ("temperature", "scale"):
            value = getattr(self, name)
            if type(value) is bool or not isinstance(value, int | float) or not 0 < value < inf:
                raise ValueError(f"{name} must be a number above 0, got {value!r}; 1 is neutral")

    def neutral(self) -> ScaledContext:
        return replace(self, temperature=1.0, scale=1.0)

    def acts(self, seen: Seen) -> bool:
        return bool(seen.reused.any())

    def scores(self, scores: Tensor, seen: Seen, choice: Tensor | None) -> Tensor:
        reused = seen.reused[:, None, None]
        cooled = scores / self.temperature
        lse = cooled.masked_fill(~reused, float("-inf")).logsumexp(-1, keepdim=True)
        lse = lse.masked_fill(lse == float("-inf"), 0.0)  # a row that sees no reused key
        return (cooled + (self.scale * self.temperature - 1) * lse).where(reused, scores)


def chunk_scores(weights: Tensor, chunk: Tensor, num_chunks: int, top: int = 5) -> Tensor:
    """Attention of each row to each chunk, ``(B, H, R, C)``: the sum of its ``top`` probabilities.

    ``weights`` are probabilities ``(B, H, R, N)``; ``chunk`` is each column's chunk, ``(B, N)``,
    negative outside of chunks. Source: arXiv:2412.16545, selective attention.
    """
    import torch

    # Sort columns by chunk; then make a table (B, C, longest) of each chunk's.
    by_chunk = chunk.argsort(dim=1, stable=True)
    ids = chunk.gather(1, by_chunk)
    chunks = torch.arange(num_chunks, device=chunk.device).repeat(len(chunk), 1)
    start, stop = (torch.searchsorted(ids, chunks, side=s)[..., None] for s in ("left", "right"))
    index = start + torch.arange(max(1, int((stop - start).max())), device=chunk.device)
    columns = by_chunk.gather(1, index.clamp(max=chunk.shape[1] - 1).flatten(1))[:, None, None]
    each = weights.gather(-1, columns.expand(*weights.shape[:3], -1)).unflatten(-1, index.shape[1:])
    each = each.masked_fill((index >= stop)[:, None, None], 0.0)
    return each.topk(min(top, each.shape[-1]), dim=-1).values.sum(-1)


@RESHAPES.register("top-chunks")
class TopChunks(Reshape):
    """Hides all but the chunks that a row attends to most.

    A chunk's score is the sum of its five largest attention probabilities. Only chunks are hidden,
    but not the own chunk of a recomputed row. ``aggregation`` is what scores are summed over:
    ``none`` (each row and head decides alone), ``T`` the question's rows, ``HT`` also heads,
    ``LHT`` also layers, in a pass of the question over the caches before the prefill. A decoded or
    recomputed row decides alone (with ``LHT`` it follows the question); the source leaves it open.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2412.16545"  # section 5.2
    surveys: ClassVar[bool] = True
    chunks: int = 2  # chunks that stay visible, at least 1
    aggregation: str = "HT"

    def __post_init__(self):
        require_count("chunks", self.chunks, least=1)
        require_one_of("aggregation", self.aggregation, ("none", "T", "HT", "LHT"))

    @property
    def keeps_causality(self) -> bool:
        return self.aggregation == "none"

    @property
    def looks_ahead(self) -> bool:
        return self.aggregation == "LHT"

    def neutral(self) -> TopChunks:
        return replace(self, chunks=EVERY_CHUNK)

    def acts(self, seen: Seen) -> bool:
        return seen.num_chunks > 0

    def survey(self, scores: Tensor, seen: Seen) -> Tensor:
        chunk = seen.key.chunk.where(seen.in_chunk, -1)
        return chunk_scores(scores.softmax(dim=-1), chunk, seen.num_chunks)

    def choose(self, survey: Tensor, query: Rows) -> Tensor:
        import torch

        from blocktune.layout import Kind

        if self.aggregation != "none":
            is_question = (query.kind == Kind.QUERY)[:, None, :, None]
            total = survey.masked_fill(~is_question, 0.0).sum(2, keepdim=True)
            survey = total.where(is_question, survey)
            if self.aggregation != "T":
                survey = survey.sum(1, keepdim=True)
        own = query.chunk.where(in_chunk(query), -1)[:, None, :, None]
        own = own == torch.arange(survey.shape[-1], device=own.device)
        ranked = survey.masked_fill(own, -1.0).argsort(dim=-1, descending=True, stable=True)
        return (ranked.argsort(dim=-1) < self.chunks) | own

    def scores(self, scores: Tensor, seen: Seen, choice: Tensor) -> Tensor:
        chunk = seen.key.chunk.clamp(min=0)[:, None, None]
        kept = choice.gather(-1, chunk.expand(*choice.shape[:3], -1))
        return scores.masked_fill_(seen.in_chunk[:, None, None] & ~kept, float("-inf"))
