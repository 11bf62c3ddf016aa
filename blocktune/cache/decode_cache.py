"""Decoding on transformers' own cache layers: a sliding window, quantised, or offloaded."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from transformers import cache_utils
from transformers.cache_utils import Cache, CacheLayerMixin

from blocktune.cache.row_cache import RowCache
from blocktune.parsing import first_line

LAYERS = {
    "sliding": "DynamicSlidingWindowLayer",
    "fp8": "Fp8QuantizedLayer",
    "quanto": "QuantoQuantizedLayer",
    "hqq": "HQQQuantizedLayer",
    "offloaded": "DynamicLayer",
}


@dataclass(frozen=True)
class DecodeCache:
    """How keys and values are stored while an answer is decoded, after its prefill.

    ``sliding`` keeps the last ``window`` tokens; ``fp8`` has a scale for each layer and batch;
    ``quanto`` and ``hqq`` have 4 bits; ``offloaded`` keeps on the CPU every layer but the one being
    computed. Raises ValueError if the kind cannot be used here.
    """

    kind: str
    window: int = 0

    @classmethod
    def parse(cls, text: str) -> DecodeCache:
        """Reads ``sliding:1024`` or the name of another kind."""
        kind, _, window = text.partition(":")
        return cls(kind, int(window)) if window.isdigit() else cls(text)

    def __post_init__(self):
        fits = self.window > 1 if self.kind == "sliding" else not self.window
        if self.kind not in LAYERS or not fits:
            known = ", ".join(LAYERS).replace("sliding", "sliding:TOKENS (2 or more)")
            given = f"{self.kind}:{self.window}" if self.window else self.kind
            raise ValueError(f"a decode cache is one of {known}; got '{given}'")
        if self.kind == "offloaded" and not torch.cuda.is_available():
            raise ValueError("decode cache 'offloaded' moves keys off a GPU, and there is none")
        layer = self.layer()
        if self.kind == "quanto":  # compiles an extension at first use: do it now, not in a request
            try:
                layer.update(torch.zeros(1, 1, 2, 64), torch.zeros(1, 1, 2, 64))
            except Exception as error:  # from torch, the compiler or the linker
                hint = "install a C++ compiler and ninja, or use fp8 or hqq"
                reason = f"it cannot be compiled ({first_line(error)}); {hint}"
                raise ValueError(f"decode cache 'quanto': {reason}") from None

    def layer(self, *dims: int) -> CacheLayerMixin:
        """An empty transformers cache layer; ``dims`` are the head dims of keys and values."""
        grouped = self.kind in ("quanto", "hqq")
        options = {"q_group_size": math.gcd(64, *dims)} if grouped else {}
        try:
            cls = getattr(cache_utils, LAYERS[self.kind])
            return cls(self.window) if self.window else cls(**options)
        except (AttributeError, ImportError) as error:
            reason = first_line(error)
            raise ValueError(f"decode cache '{self.kind}' cannot be used here: {reason}") from None


class DecodingCache(Cache):
    """A `RowCache` after its prefill, moved to transformers' cache layers. It can only append."""

    def __init__(self, how: DecodeCache, rows: RowCache, reshapes: bool):
        """Copies layer by layer, and frees each layer of ``rows``.

        ValueError: a window with a reshape, which changes columns that it hides, or with several
        prompts, in whose padding it would end.
        """
        if how.window and (reshapes or rows.layers[0].batch_size > 1):
            raise ValueError(
                "a sliding decode cache needs a batch size of 1, by a method without a reshape"
            )
        layers = [how.layer(la.keys.shape[-1], la.values.shape[-1]) for la in rows.layers]
        super().__init__(layers=layers, offloading=how.kind == "offloaded")
        self.num_columns, self.window = rows.num_columns, how.window
        self._bytes = [rows.bytes_per_column(index) for index in range(len(layers))]
        for index, layer in enumerate(layers):
            self.update(rows.layers[index].keys, rows.layers[index].values, index)
            if how.window:  # the layer holds views of the full tensors
                layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
            rows.layers[index] = layer

    @property
    def first_column(self) -> int:
        """First column that the next row sees."""
        return max(0, self.num_columns - self.window) if self.window else 0

    def append(self, count: int = 1) -> None:
        """Counts the ``count`` columns that the next forward pass adds."""
        self.num_columns += count

    def bytes_per_column(self, layer: int) -> int:
        """Bytes of one token's keys and values in the prefill's cache."""
        return self._bytes[layer]
