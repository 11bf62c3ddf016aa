"""Attention to the few chunks that matter most for a row."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from blocktune.methods.reshape.base import RESHAPES, Reshape, Seen, in_chunk
from blocktune.registry import require_count, require_one_of

if TYPE_CHECKING:
    from torch import Tensor

    from blocktune.layout import Rows

EVERY_CHUNK = 1 << 30


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

    A chunk's score is the sum of its five largest attention probabilities. Prefix, links, question
    and answer are never hidden, nor is the own chunk of a recomputed row. Recomputed tokens belong
    to their chunk. ``aggregation`` is what scores are summed over: ``none`` (each row and head
    decides alone), ``T`` the question's rows, ``HT`` also heads, ``LHT`` also layers, in a pass of
    the question over the caches before the prefill. A decoded or recomputed row decides alone (with
    ``LHT`` it follows the question).

    The source does not define what decoded rows do.
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
