"""KV caches of prompts that stock transformers models accept as ``past_key_values``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionCacheLayerMixin

from blocktune.cache.chunk_kv import State

SKIP = -1  # column number of a padding row, whose keys and values are not stored


def refuse_autocast(states: Tensor) -> None:
    """Raises ValueError if autocast is on where ``states`` are computed."""
    if torch.is_autocast_enabled(states.device.type):
        raise ValueError(
            "the model runs under autocast, but cached states have the model's own dtype; call the "
            "engine outside of torch.autocast, and take a Trainer's model out of it by "
            "trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)"
        )


class _Target(NamedTuple):
    """Where the rows of a forward pass go: ``row[i]`` of prompt ``batch[i]`` to ``column[i]``."""

    columns: Tensor  # as passed to `RowCache.select`, (B, R)
    batch: Tensor  # (P,) for the P rows that are not padding; row and column likewise
    row: Tensor
    column: Tensor


def _zero_filled(name: str) -> property:
    """Property that zeroes unwritten columns when read: masked columns must be finite."""

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
    """One layer of a `RowCache`: keys and values ``(B, K, N, D)``, allocated at the first write."""

    is_sliding = False
    supports_early_init = False
    keys, values = _zero_filled("_keys"), _zero_filled("_values")

    def __init__(self, batch_size: int, num_columns: int, spare: int):
        super().__init__()
        self.batch_size, self.num_columns, self.spare = batch_size, num_columns, spare
        self.target: _Target | None = None
        self.unwritten: np.ndarray | None = None  # columns not written yet, bool (B, N + spare)
        # Called with keys and values (B, K, R, D) before they are written; it may raise.
        self.observer: Callable[[Tensor, Tensor], None] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        columns = self.num_columns + self.spare
        self.stores = tuple(
            states.new_empty(self.batch_size, states.shape[1], columns, states.shape[3])
            for states in (key_states, value_states)
        )
        # In NumPy: the same flags in a tensor cost ten times as much.
        self.unwritten = np.ones((self.batch_size, columns), bool)
        self.is_initialized = True
        self._show()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        # Writes the pass's rows into their columns, and returns views of all columns.
        selected = None if self.target is None else tuple(self.target.columns.shape)
        computed = key_states.shape[0], key_states.shape[2]
        if selected != computed:
            raise ValueError(f"(prompts, rows) are {computed}, but selected were {selected}")
        refuse_autocast(key_states)
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
        """Keys and values of the selected columns, ``(B, K, R, D)``; padding rows are arbitrary."""
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
            # Grow by half: decoding then copies each column a bounded number of times.
            extra = missing + self.num_columns // 2
            self.stores = tuple(
                torch.cat([s, s.new_zeros(*s.shape[:2], extra, s.shape[3])], dim=2)
                for s in self.stores
            )
        self._show()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.num_columns, 0  # the mask covers all columns and handles windows itself

    def get_seq_length(self) -> int:
        # What transformers expects: the columns before the selected rows, if these are the last.
        selected = 0 if self.target is None else self.target.columns.shape[1]
        return self.num_columns - selected

    def get_max_length(self) -> int:
        return -1  # no maximum

    def _show(self) -> None:
        self.keys, self.values = (store[:, :, : self.num_columns] for store in self.stores)


class RowCache(Cache):
    """Keys and values of a batch of prompts. Every column is addressable, no layer is truncated.

    Use: write cached states into `room`, `select` the columns of the rows to compute (a recomputed
    token overwrites its original), run the model with ``past_key_values=cache`` and a mask over all
    columns, then `append` and run again for every decoded token. Only an ``exact`` cache, which
    holds a full prefill, may feed the exact prefix cache; writing reused states clears the flag.
    """

    first_column = 0  # first column that later rows see

    def __init__(
        self,
        num_layers: int,
        batch_size: int,  # prompts, ``B``
        num_columns: int,  # of every layer, ``N``
        *,
        spare: int = 0,  # extra columns to allocate, e.g. the number of tokens to decode
        exact: bool = False,
    ):
        layers = [_RowLayer(batch_size, num_columns, spare) for _ in range(num_layers)]
        super().__init__(layers=layers)
        self.exact = exact

    @property
    def num_columns(self) -> int:
        """Number of columns of every layer, ``N``."""
        return self.layers[0].num_columns

    def select(self, columns: Tensor, layers: Iterable[int] | None = None) -> None:
        """Sets where the rows of the next forward passes go, in the given ``layers`` or in all.

        ``columns``, ``(B, R)`` int64: each row's own, or `SKIP` for padding. They are not verified.
        """
        batch, row = (columns != SKIP).nonzero(as_tuple=True)
        target = _Target(columns, batch, row, columns[batch, row])
        for layer in range(len(self)) if layers is None else layers:
            self.layers[layer].target = target

    def append(self, count: int = 1) -> Tensor:
        """Adds and selects columns at the end of every prompt. Returns them, ``(B, count)``."""
        start = self.num_columns
        for layer in self.layers:
            layer.grow(count)
        device = self.layers[0].device if self.layers[0].is_initialized else None
        columns = torch.arange(start, start + count, device=device)
        self.select(columns := columns.expand(self.layers[0].batch_size, -1))
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
        """Views ``(K, columns, D)`` of a prompt's keys and values; the caller must fill them.

        ``keys`` and ``values`` ``(K, S, D)`` are examples of shape and dtype. The cache stays exact
        only if the states come from a full prefill of the prompt (``exact``).
        """
        self.exact, target = self.exact and exact, self.layers[layer]
        if not target.is_initialized:
            target.lazy_initialization(keys[None], values[None])
        if target.unwritten is not None:
            target.unwritten[prompt, columns] = False
        return tuple(store[prompt, :, columns] for store in target.stores)

    def bytes_per_column(self, layer: int) -> int:
        """Bytes of one token's keys and values in a layer that stores them."""
        return sum(s.shape[1] * s.shape[3] * s.element_size() for s in self.layers[layer].stores)


class PrefillCache(DynamicCache):
    """Transformers' own cache of one prompt, from its first token on, for recurrent layers."""

    exact = True  # tokens are computed in order, and only what a `PrefixMatch` holds is loaded

    def __init__(self, config):
        super().__init__(config=config)
        self.num_columns = 0  # number of tokens; the caller adds to it after each pass

    def state(self) -> State:
        """A copy of the recurrent state after the tokens so far."""
        pairs = [(la.conv_states[i], la.recurrent_states[i]) for la, i in self._recurrent()]
        return tuple(None if t is None else t.clone() for pair in pairs for t in pair)

    def resume(
        self, num_tokens: int, layers: Iterable[tuple[list[Tensor], list[Tensor]]], state: State
    ) -> None:
        """Fills the empty cache with a prefix, whose arguments come from a `PrefixMatch`."""
        with_keys = [layer for layer in self.layers if hasattr(layer, "keys")]
        for layer, (keys, values) in zip(with_keys, layers, strict=True):
            layer.update(torch.cat(keys, 1)[None], torch.cat(values, 1)[None])
        states = iter(state or ())
        for layer, index in self._recurrent():
            for update in (layer.update_conv_state, layer.update_recurrent_state):
                if (held := next(states)) is not None:
                    update(held, index)  # the cache copies it
        self.num_columns = num_tokens

    def key_bytes(self) -> int:
        """Size of keys and values in bytes."""
        kinds = (getattr(layer, kind, None) for layer in self.layers for kind in ("keys", "values"))
        return sum(tensor.nbytes for tensor in kinds if tensor is not None)

    def _recurrent(self) -> list[tuple[LinearAttentionCacheLayerMixin, int]]:
        layers = [x for x in self.layers if isinstance(x, LinearAttentionCacheLayerMixin)]
        return [(layer, index) for layer in layers for index in range(layer.number_of_states)]
