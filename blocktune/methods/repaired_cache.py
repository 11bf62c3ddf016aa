"""Applies a repair to one batch: keeps what was compared, and adds offsets to the cache."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from blocktune.cache import RowCache
from blocktune.layout import GLOBAL, Kind, Rows
from blocktune.methods.repair import Repair, Residual
from blocktune.methods.select import LayerKV


class RepairedCache:
    """Shared by all layers of a batch's prefill.

    It watches the writes of the cache: in every layer it adds the repair's offsets to the columns
    that the layer reuses, just before the recomputed ones are written.
    """

    def __init__(self, repair: Repair, columns: Rows, cache: RowCache):
        """Repairs ``cache`` with the facts of its ``columns``, ``(B, N)``."""
        self.repair, self.columns, self.cache = repair, columns, cache
        # What was computed in full in another prompt was not encoded alone, but is reused too.
        self._is_cached = (columns.kind == Kind.CHUNK) & (columns.group != GLOBAL)
        self._deviations: tuple[Tensor, Tensor] | None = None

    def compared(self, columns: Tensor, fresh: LayerKV, cached: LayerKV) -> None:
        """Keeps how far the rows of ``columns`` were from the cache at the first check layer."""
        if self._deviations is None:
            pairs = zip(fresh, cached, strict=True)
            norms = [(a.float() - b.float()).square().sum((1, 3)).sqrt() for a, b in pairs]
            self._deviations = tuple(self._at_columns(norm, columns) for norm in norms)

    def watch(self, layer: int, columns: Tensor) -> None:
        """Repairs ``layer`` when it writes these ``columns``, which are all that it computes."""
        recomputed = self._at_columns(torch.ones_like(columns), columns).bool()
        recomputed = recomputed & self._is_cached
        some = bool(recomputed.any()) and bool((self._is_cached & ~recomputed).any())
        repair = partial(self._repair, layer, columns, recomputed) if some else None
        self.cache.layers[layer].observer = repair

    def _repair(self, layer: int, columns: Tensor, recomputed: Tensor, *fresh: Tensor) -> None:
        states = self.cache.layers[layer]
        reused = self._is_cached & ~recomputed
        chunk = torch.where(self._is_cached, self.columns.chunk, -1)
        deviations = self._deviations or (None, None)
        held, stored = states.held(), (states.keys, states.values)
        for new, old, deviation, whole in zip(fresh, held, deviations, stored, strict=True):
            moved = (new.float() - old.float()).transpose(1, 2)
            change = self._at_columns(moved, columns).transpose(1, 2)
            change = change * recomputed[:, None, :, None]
            seen = Residual(change, recomputed, reused, chunk, deviation)
            offset = self.repair.offset(seen) * reused[:, None, :, None]
            whole.copy_((whole.float() + offset).to(whole.dtype))

    def _at_columns(self, values: Tensor, columns: Tensor) -> Tensor:
        """Values of rows ``(B, R, ...)`` at their columns, ``(B, N, ...)``; zero elsewhere."""
        count = self.columns.kind.shape[1]
        whole = values.new_zeros(len(values), count + 1, *values.shape[2:])
        slots = columns.where(columns >= 0, count).view(*columns.shape, *[1] * (values.ndim - 2))
        return whole.scatter(1, slots.expand_as(values), values)[:, :count]
