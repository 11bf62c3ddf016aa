"""Applies a reshape to one batch: tracks reused columns, and attends with reshaped scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from blocktune.attention.kernels import (
    AttentionParams,
    attention_weights,
    plain_scores,
    weighted_values,
)
from blocktune.attention.masks import RowBand
from blocktune.layout import Kind, LayerRule, Rows
from blocktune.methods.reshape import RESHAPES, Reshape, Seen, in_chunk
from blocktune.registry import require_like

CELLS = 1 << 25
"""Most scores held in memory at once, unless a single row has more."""


class ReshapedAttention:
    """Shared by all attention plans of a batch, from the prefill to the last decoded token.

    It keeps a bitmap of reused tokens per layer: all tokens of chunks, without the rows that a plan
    attends with, which have just overwritten their columns. Decoded tokens read the same bitmap.
    ``multiply_adds`` ``(B,)`` counts the extra scores that surveys compute.
    """

    def __init__(self, reshape: Reshape, columns: Rows):
        self.reshape = reshape
        self.multiply_adds = torch.zeros(len(columns.kind), dtype=torch.int64)
        self._is_chunk = in_chunk(columns)
        self._num_chunks = int(columns.chunk.max()) + 1
        self._reused: dict[int, Tensor] = {}
        self._acts: dict[int, bool] = {}
        self._band: RowBand | None = None  # rows of the pass that all layers share
        self._entropy: list[Tensor] = []
        self._looking = False
        self._ahead: Tensor | None = None  # summed surveys of the look-ahead pass, (B, 1, 1, X)

    @contextmanager
    def looking_ahead(self) -> Iterator[None]:
        """Inside the block, forward passes only survey scores; the usual kernels attend."""
        self._looking, self._ahead = True, None
        try:
            yield
        finally:
            self._looking = False

    def wrote(self, layer: int, columns: Tensor) -> None:
        """Marks columns ``(B, R)`` of a layer as recomputed; ignores negative and decoded ones."""
        count = self._is_chunk.shape[1]
        slots = columns.where((columns >= 0) & (columns < count), count)
        written = F.pad(self._is_chunk & False, (0, 1)).scatter(1, slots, True)
        self._reused[layer] = self._reused.get(layer, self._is_chunk) & ~written[:, :count]

    def attend(self, band, columns, query, key, value, rule, params) -> Tensor | None:
        """Attends, in float32, rows that were written into ``columns`` ``(B, R)``, -1 for padding.

        Other arguments as for `RowBand.attend`. Returns ``(B, H, R, D)``, or None: no change.
        """
        seen = self._enter(band, columns, rule.layer)
        if not self._acts[rule.layer]:
            return None
        rule, value = LayerRule(window=rule.window), value.float()
        scored = partial(self._scored, rule, seen, query, key.float(), params)
        choice = self._choice(seen, scored, query, rule) if self.reshape.surveys else None
        if self._looking:
            return None
        outs, entropy = [], []
        for rows, keys, scores, part in scored():
            chosen = None if choice is None else choice[:, :, rows]
            given = self.reshape.scores(scores, part, chosen)
            require_like(f"reshape '{RESHAPES.name_of(self.reshape)}'", given, scores)
            weights = attention_weights(given, params)
            if self._has_question:
                entropy.append(torch.special.entr(weights).sum(-1).mean(1))
            outs.append(weighted_values(weights, value[:, :, keys]))
        if entropy:
            asks, rows = self._asks, torch.cat(entropy, dim=1)
            self._entropy.append(rows.masked_fill(~asks, 0.0).sum(1) / asks.sum(1))
        return torch.cat(outs, dim=2).to(query.dtype)

    def query_entropy(self) -> list[float | None]:
        """Entropy of the question's attention, in nats, per prompt (arXiv:2412.16545).

        Mean over its rows, the heads and the layers that were reshaped; None if there are none.
        """
        if not self._entropy:
            return [None] * len(self._is_chunk)
        return torch.stack(self._entropy).mean(0).tolist()

    def _enter(self, band: RowBand, columns: Tensor, layer: int) -> Seen:
        if self._band is not band:
            self._band, self._asks = band, band.query.kind == Kind.QUERY
            self._has_question = bool(self._asks.any(1).all())
            # Decoded rows are not written into the prompt's columns.
            self._writes = bool((band.query_exists & (band.query.kind != Kind.ANSWER)).any())
        if self._writes:
            self.wrote(layer, columns)
        reused = self._reused.setdefault(layer, self._is_chunk)
        decoded = band.key.kind.shape[1] - reused.shape[1]
        seen = Seen(band.query, band.key, F.pad(reused, (0, decoded)), self._num_chunks)
        if self._writes or layer not in self._acts:
            self._acts[layer] = self.reshape.acts(seen)
        return seen

    def _scored(
        self, rule: LayerRule, seen: Seen, query: Tensor, key: Tensor, params: AttentionParams
    ) -> Iterator[tuple[slice, slice, Tensor, Seen]]:
        """Yields rows and columns with their scores, at most `CELLS` at a time."""
        for rows, keys, mask in self._band.blocks(rule):
            columns = seen.key.map(lambda field, keys=keys: field[:, keys])
            part = seen._replace(key=columns, reused=seen.reused[:, keys])
            step = max(1, CELLS // (len(query) * query.shape[1] * mask.shape[-1]))
            for start in range(rows.start, rows.stop, step):
                span = slice(start, min(start + step, rows.stop))
                inside = mask[:, :, start - rows.start : span.stop - rows.start]
                scores = plain_scores(query[:, :, span], key[:, :, keys], inside, params)
                own = seen.query.map(lambda field, span=span: field[:, span])
                yield span, keys, scores, part._replace(query=own)

    def _choice(
        self, seen: Seen, scored: Callable, query: Tensor, rule: LayerRule
    ) -> Tensor | None:
        if self.reshape.looks_ahead and not self._looking:
            assert self._ahead is not None, "the look-ahead pass of this reshape was not run"
            rows = seen.query.kind.shape[1]
            return self.reshape.choose(self._ahead.expand(-1, 1, rows, -1), seen.query)
        survey = torch.cat([self.reshape.survey(*block[2:]) for block in scored()], dim=2)
        pairs = self._band.pairs(rule.window) * query.shape[1] * query.shape[3]
        self.multiply_adds += pairs.cpu()
        if not self._looking:
            return self.reshape.choose(survey, seen.query)
        asks = self._asks[:, None, :, None]
        asked = survey.masked_fill(~asks, 0.0).sum((1, 2), keepdim=True)
        self._ahead = asked if self._ahead is None else self._ahead + asked
        return None
