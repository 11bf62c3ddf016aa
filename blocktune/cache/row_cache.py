"""The cache of a batch of prompts, or of one, in a form that stock transformers models accept."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionCacheLayerMixin

from blocktune.cache.chunk_kv import State

SKIP = -1
"""Column of a padding row: its keys and values are not stored."""

Observer = Callable[[Tensor, Tensor], None]
"""Called as ``observer(keys, values)``, both ``(B, K, R, D)``, before they are written; if it
raises, the forward pass ends with the layer as it was."""


class _Target(NamedTuple):
    """Where the rows of a forward pass go: ``row[i]`` of prompt ``batch[i]`` to ``column[i]``."""

    columns: Tensor  # as selected, (B, R)
    batch: Tensor  # of the P rows that are stored, (P,), as are row and column
    row: Tensor
    column: Tensor


def _settled(name: str) -> property:
    """Keys or values, with zeros where nothing was written: masked columns must be finite."""

    def get(layer: _RowLayer) -> Tensor | None:
        if layer.unwritten is not None:
            unwritten = torch.from_numpy(layer.unwritten).nonzero(as_tuple=True)
            prompt, column = (index.to(layer.device) for index in unwritten)
            layer.unwritten = None
            for store in layer.stores:
                store[prompt, :, column] = 0
        return getattr(layer, name)

    return property(get, lambda layer, tensor: setattr(layer, name, tensor))


class _RowLayer(CacheLayerMixin):
    """One layer of a `RowCache`: keys and values ``(B, K, N, D)``, made at the first write."""

    is_sliding = False
    is_compileable = False
    supports_early_init = False
    keys, values = _settled("_keys"), _settled("_values")

    def __init__(self, index: int, batch_size: int, num_columns: int, spare: int):
        super().__init__()
        self.index = index
        self.batch_size = batch_size
        self.num_columns = num_columns
        self.spare = spare
        self.target: _Target | None = None
        self.unwritten: np.ndarray | None = None  # columns not written yet, bool (B, N + spare)
        self.observer: Observer | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        columns = self.num_columns + self.spare
        self.stores = tuple(
            states.new_empty(self.batch_size, states.shape[1], columns, states.shape[3])
            for states in (key_states, value_states)
        )
        # In NumPy: marks of tensors cost ten times as much.
        self.unwritten = np.ones((self.batch_size, columns), bool)
        self.is_initialized = True
        self._show()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        # A pass's rows go into their columns; what comes back are views of all columns.
        wanted = None if self.target is None else tuple(self.target.columns.shape)
        if wanted != (key_states.shape[0], key_states.shape[2]):
            raise ValueError(
                f"layer {self.index} computed {key_states.shape[2]} rows for "
                f"{key_states.shape[0]} prompts, but columns were selected for {wanted}; "
                "call `RowCache.select` or `append` before every forward pass"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.observer is not None:
            self.observer(key_states, value_states)
        self.store(key_states, value_states)
        return self.keys, self.values

    def store(self, key_states: Tensor, value_states: Tensor) -> None:
        """Writes rows ``(B, K, R, D)`` into the selected columns without a forward pass."""
        _, batch, row, column = self.target
        self.keys[batch, :, column] = key_states[batch, :, row]
        self.values[batch, :, column] = value_states[batch, :, row]

    def held(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the selected columns, ``(B, K, R, D)``; arbitrary in padding."""
        columns = self.target.columns.clamp(min=0)[:, None, :, None]
        return tuple(
            states.gather(2, columns.expand(-1, states.shape[1], -1, states.shape[3]))
            for states in (self.keys, self.values)
        )

    def grow(self, count: int) -> None:
        self.num_columns += count
        if not self.is_initialized:
            return
        missing = self.num_columns - self.stores[0].shape[2]
        if missing > 0:
            # By half as much again: decoding copies each column a bounded number of times.
            extra = missing + self.num_columns // 2
            self.stores = tuple(
                torch.cat([s, s.new_zeros(*s.shape[:2], extra, s.shape[3])], dim=2)
                for s in self.stores
            )
        self._show()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.num_columns, 0  # all are seen: a window lives in the mask

    def get_seq_length(self) -> int:
        # Columns before the selected rows, if these are the last: what transformers asks.
        selected = 0 if self.target is None else self.target.columns.shape[1]
        return self.num_columns - selected

    def get_max_length(self) -> int:
        return -1  # no maximum

    def reorder_cache(self, beam_idx: Tensor) -> None:
        raise ValueError("a RowCache does not serve beam search; use greedy decoding or sampling")

    def _show(self) -> None:
        self.keys, self.values = (store[:, :, : self.num_columns] for store in self.stores)


class RowCache(Cache):
    """Keys and values of a batch of prompts, every column addressable, no layer truncated.

    A recomputed token overwrites the column of its original. Use: write cached states into
    `room`, `select` the columns of the rows to compute, run the model with
    ``past_key_values=cache`` and an explicit mask over all columns (or blocktune's attention
    plan), `append` and run again for every decoded token.

    An ``exact`` one is that of a full prefill: every row is computed after everything before it.
    Only such a cache may feed the exact prefix cache; writing reused states ends it for good.
    """

    first_column = 0  # that later rows see

    def __init__(
        self,
        num_layers: int,
        batch_size: int,  # prompts, ``B``
        num_columns: int,  # of every layer, ``N``
        *,
        spare: int = 0,  # more columns to allocate, e.g. the number of tokens to decode
        exact: bool = False,
    ):
        layers = [_RowLayer(i, batch_size, num_columns, spare) for i in range(num_layers)]
        super().__init__(layers=layers)
        self.exact = exact

    @property
    def num_columns(self) -> int:
        """Columns of every layer, ``N``."""
        return self.layers[0].num_columns

    def select(self, columns: Tensor, layers: Iterable[int] | None = None) -> None:
        """Says where the rows of the following forward passes go, in some ``layers`` or in all.

        ``columns`` ``(B, R)`` int64 are each row's column, or `SKIP` for a padding row.
        """
        target = self._target(columns)
        for layer in range(len(self)) if layers is None else layers:
            self.layers[layer].target = target

    def append(self, count: int = 1) -> Tensor:
        """Adds columns ``(B, count)`` at the end of every prompt and selects them in all layers."""
        start = self.num_columns
        for layer in self.layers:
            layer.grow(count)
        device = self.layers[0].device if self.layers[0].is_initialized else None
        columns = torch.arange(start, start + count, device=device)
        columns = columns.expand(self.layers[0].batch_size, -1)
        self.select(columns)
        return columns

    def room(
        self,
        layer: int,
        prompt: int,
        columns: slice,
        keys: Tensor,
        values: Tensor,
        *,
        exact: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Views ``(K, columns, D)`` of one prompt's keys and values, to be written over at once.

        ``keys`` and ``values`` are any of the model's in that layer, ``(K, S, D)``: for shape and
        dtype. ``exact`` says that the states come from a full prefill of the same prompt; else the
        cache is not exact from now on.
        """
        self.exact, one = self.exact and exact, self.layers[layer]
        if not one.is_initialized:
            one.lazy_initialization(keys[None], values[None])
        if one.unwritten is not None:
            one.unwritten[prompt, columns] = False
        return tuple(store[prompt, :, columns] for store in one.stores)

    def bytes_per_column(self, layer: int) -> int:
        """Bytes of one token's keys and values in a layer that holds any."""
        states = (self.layers[layer].keys, self.layers[layer].values)
        return sum(s.shape[1] * s.shape[3] * s.element_size() for s in states)

    def _target(self, columns: Tensor) -> _Target:
        expected = self.layers[0].batch_size
        if columns.ndim != 2 or columns.shape[0] != expected or columns.dtype != torch.int64:
            raise ValueError(
                f"columns must be int64 ({expected}, rows); "
                f"got {tuple(columns.shape)} {columns.dtype}"
            )
        ordered = columns.sort(dim=1).values
        twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != SKIP)
        if twice.any() or (columns < SKIP).any() or (columns >= self.num_columns).any():
            raise ValueError(
                f"columns must be in 0..{self.num_columns - 1} (or {SKIP} for padding), "
                "each at most once in a prompt"
            )
        batch, row = (columns != SKIP).nonzero(as_tuple=True)
        return _Target(columns, batch, row, columns[batch, row])


class PrefillCache(DynamicCache):
    """Transformers' own cache, filled from the first token on or resumed from an exact prefix.

    For models with recurrent layers, one prompt each.
    """

    exact = True  # tokens are computed in order, and only what a `PrefixMatch` holds is loaded

    def __init__(self, config):
        """Takes the model's configuration."""
        super().__init__(config=config)
        self.num_columns = 0  # tokens in it; whoever runs the model adds them

    def state(self) -> State:
        """A copy of the recurrent state after the tokens so far."""
        pairs = [(la.conv_states[i], la.recurrent_states[i]) for la, i in self._recurrent()]
        return tuple(None if t is None else t.clone() for pair in pairs for t in pair)

    def resume(
        self, num_tokens: int, layers: Iterable[tuple[list[Tensor], list[Tensor]]], state: State
    ) -> None:
        """Fills the empty cache with a known prefix, as a `PrefixMatch` has it."""
        with_keys = [layer for layer in self.layers if hasattr(layer, "keys")]
        for layer, (keys, values) in zip(with_keys, layers, strict=True):
            layer.update(torch.cat(keys, 1)[None], torch.cat(values, 1)[None])
        states = iter(state or ())
        for layer, index in self._recurrent():
            _put(layer.update_conv_state, next(states), index)
            _put(layer.update_recurrent_state, next(states), index)
        self.num_columns = num_tokens

    def key_bytes(self) -> int:
        """Bytes of keys and values."""
        kinds = (getattr(layer, kind, None) for layer in self.layers for kind in ("keys", "values"))
        return sum(tensor.nbytes for tensor in kinds if tensor is not None)

    def _recurrent(self) -> list[tuple[LinearAttentionCacheLayerMixin, int]]:
        layers = [x for x in self.layers if isinstance(x, LinearAttentionCacheLayerMixin)]
        return [(layer, index) for layer in layers for index in range(layer.number_of_states)]


def _put(update, state: Tensor | None, index: int) -> None:
    if state is not None:
        update(state, index)  # copies it into memory of the cache's own
