"""One layer of the prompt cache, behind transformers' interface for cache layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

SKIP = -1
"""Column of a padding row: its keys and values are not stored."""

Observer = Callable[[Tensor, Tensor], None]
"""Called as ``observer(keys, values)``, both ``(B, K, R, D)``, before they are written."""


class Target(NamedTuple):
    """Where the rows of a forward pass go: ``row[i]`` of prompt ``batch[i]`` to ``column[i]``.

    Attributes:
        columns: As selected, ``(B, R)``.
        batch: The ``P`` rows that are stored, ``(P,)``, as are ``row`` and ``column``.
        row: Row in the forward pass.
        column: Column in the cache.
    """

    columns: Tensor
    batch: Tensor
    row: Tensor
    column: Tensor


class RowLayer(CacheLayerMixin):
    """One layer of a `RowCache`: keys and values ``(B, K, N, D)``, made at the first write."""

    is_sliding = False
    is_compileable = False
    supports_early_init = False

    def __init__(self, index: int, batch_size: int, num_columns: int, spare: int):
        self.pending: list[Callable[[], None]] = []
        super().__init__()
        self.index = index
        self.batch_size = batch_size
        self.num_columns = num_columns
        self.spare = spare
        self.target: Target | None = None
        self.observer: Observer | None = None

    @property
    def keys(self) -> Tensor | None:
        """Of all columns, ``(B, K, N, D)``, or None before the first write."""
        self.settle()
        return self._keys

    @keys.setter
    def keys(self, keys: Tensor | None) -> None:
        self._keys = keys

    def settle(self) -> None:
        """Writes what was put off until somebody looks, see `RowCache.defer`."""
        pending, self.pending = self.pending, []
        for fill in pending:
            fill()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocates all columns and the spare ones; zeros, so that masked ones are finite."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self._stores = tuple(
            states.new_zeros(
                self.batch_size, states.shape[1], self.num_columns + self.spare, states.shape[3]
            )
            for states in (key_states, value_states)
        )
        self.is_initialized = True
        self._show()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """Writes the pass's rows into their columns; an observer sees them before that.

        Args:
            key_states: ``(B, K, R, D)``, RoPE applied.
            value_states: ``(B, K, R, D)``.
            *args: What some models pass besides; not needed.
            **kwargs: Likewise.

        Returns:
            Keys and values of all columns, ``(B, K, N, D)``: views, not to be written into.

        Raises:
            ValueError: If no columns were selected for this many rows.
        """
        wanted = None if self.target is None else tuple(self.target.columns.shape)
        if wanted != (key_states.shape[0], key_states.shape[2]):
            raise ValueError(
                f"layer {self.index} computed {key_states.shape[2]} rows for "
                f"{key_states.shape[0]} prompts, but columns were selected for {wanted}; "
                "call `RowCache.select` or `append` before every forward pass"
            )
        self.settle()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.observer is not None:
            self.observer(key_states, value_states)
        self.store(key_states, value_states)
        return self.keys, self.values

    def store(self, key_states: Tensor, value_states: Tensor) -> None:
        """Writes rows ``(B, K, R, D)`` into the selected columns."""
        _, batch, row, column = self.target
        self.keys[batch, :, column] = key_states[batch, :, row]
        self.values[batch, :, column] = value_states[batch, :, row]

    def held(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the selected columns, ``(B, K, R, D)``; padding rows: arbitrary."""
        columns = self.target.columns.clamp(min=0)[:, None, :, None]
        return tuple(
            states.gather(2, columns.expand(-1, states.shape[1], -1, states.shape[3]))
            for states in (self.keys, self.values)
        )

    def grow(self, count: int) -> None:
        """Adds columns at the end, copying only when the spare ones are used up."""
        self.num_columns += count
        if not self.is_initialized:
            return
        missing = self.num_columns - self._stores[0].shape[2]
        if missing > 0:
            # By half as much again: decoding copies each column a bounded number of times.
            extra = missing + self.num_columns // 2
            self._stores = tuple(
                torch.cat([s, s.new_zeros(*s.shape[:2], extra, s.shape[3])], dim=2)
                for s in self._stores
            )
        self._show()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """All columns are seen, from the first: a window lives in the mask."""
        return self.num_columns, 0

    def get_seq_length(self) -> int:
        """Columns that the selected rows follow, were they the last: what `generate` asks."""
        selected = 0 if self.target is None else self.target.columns.shape[1]
        return self.num_columns - selected

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Refused: the engine decodes one path per prompt."""
        raise ValueError("a RowCache does not serve beam search; use greedy decoding or sampling")

    def _show(self) -> None:
        self.keys, self.values = (store[:, :, : self.num_columns] for store in self._stores)
