"""Applies a repair to one batch: records deviations, and adds offsets to the cache."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from blocktune.cache import RowCache
from blocktune.layout import GLOBAL, Kind, Rows
from blocktune.methods.repair import REPAIRS, Repair, Residual
from blocktune.methods.select import LayerKV
from blocktune.registry import require_like


class RepairedCache:
    """Shared by all layers of a batch's prefill.

    In every layer it adds the repair's offsets to the columns that the layer reuses, just before
    the recomputed columns are written.
    """

    def __init__(self, repair: Repair, columns: Rows, cache: RowCache):
        """Repairs ``cache``; ``columns`` describe its columns, ``(B, N)``."""
        self.repair, self.columns, self.cache = repair, columns, cache
        # Chunks of a prompt that is computed in full are in the group `GLOBAL`: nothing is reused.
        self._is_cached = (columns.kind == Kind.CHUNK) & (columns.group != GLOBAL)
        self._deviations: tuple[Tensor, Tensor] | None = None
        self._kept = -1  # the last layer that keeps what was compared there

    def compared(self, columns: Tensor, fresh: LayerKV, cached: LayerKV) -> None:
        """Records how far the rows of ``columns`` are from the cache at the first check layer."""
        if self._deviations is None:
            pairs = zip(fresh, cached, strict=True)
            norms = [(a.float() - b.float()).square().sum((1, 3)).sqrt() for a, b in pairs]
            self._deviations = tuple(self._at_columns(norm, columns) for norm in norms)

    def keep(self, layer: int, columns: Tensor, fresh: LayerKV) -> None:
        """Repairs ``layer``, whose compared rows ``fresh`` are written next, dropped ones too."""
        self._repair(layer, columns, *fresh)
        self._kept = layer

    def watch(self, layer: int, columns: Tensor) -> None:
        """Arranges the repair of ``layer`` when it writes ``columns``, all that it computes."""
        repair = None if layer == self._kept else partial(self._repair, layer, columns)
        self.cache.layers[layer].observer = repair

    def _repair(self, layer: int, columns: Tensor, *fresh: Tensor) -> None:
        recomputed = self._at_columns(torch.ones_like(columns), columns).bool() & self._is_cached
        reused = self._is_cached & ~recomputed
        if not (recomputed.any() and reused.any()):
            return
        states = self.cache.layers[layer]
        chunk = torch.where(self._is_cached, self.columns.chunk, -1)
        deviations = self._deviations or (None, None)
        stored = states.keys, states.values
        for new, deviation, state in zip(fresh, deviations, stored, strict=True):
            change = self._at_columns(new.float().transpose(1, 2), columns).transpose(1, 2)
            change = (change - state.float()) * recomputed[:, None, :, None]
            residual = Residual(change, recomputed, reused, chunk, deviation)
            offset = self.repair.offset(residual)
            require_like(f"repair '{REPAIRS.name_of(self.repair)}'", offset, change)
            shifted = (state.float() + offset).to(state.dtype)
            state.copy_(shifted.where(reused[:, None, :, None], state))

    def _at_columns(self, values: Tensor, columns: Tensor) -> Tensor:
        """Scatters values of rows ``(B, R, ...)`` to their columns, ``(B, N, ...)``; else zero."""
        count = self.columns.kind.shape[1]
        padded = values.new_zeros(len(values), count + 1, *values.shape[2:])
        slots = columns.where(columns >= 0, count).view(*columns.shape, *[1] * (values.ndim - 2))
        return padded.scatter(1, slots.expand_as(values), values)[:, :count]
