"""What a selector may use before the first layer: forward passes that score tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from blocktune.cache import ChunkStore
    from blocktune.prompt import Batch, Pieces


class Truth(NamedTuple):
    """What only a full prefill knows, at each layer and at every row of the layout.

    Attributes:
        key_deviation: Distance of the true keys from the cached ones, ``(L, B, S)``.
        value_deviation: Likewise of the values.
        query_attention: The question's attention to each row, ``(L, B, S)``, see
            `Passes.query_attention`.
    """

    key_deviation: Tensor
    value_deviation: Tensor
    query_attention: Tensor


class Passes(Protocol):
    """Forward passes that the engine runs on request; each is counted in the answer's usage.

    All scores are float32, 0 at rows that are no columns of the cache (blanks, padding).

    Attributes:
        batch: The prompts, stacked.
        pieces: Their tokens, chunk by chunk.
        store: Holds the engine's chunks, for selectors that keep entries of their own there.
        fingerprint: Of the model, for keys into the store.
    """

    batch: Batch
    pieces: Sequence[Pieces]
    store: ChunkStore
    fingerprint: str

    def query_attention(self) -> Tensor:
        """Computes the question over the reused cache, before anything is recomputed.

        Returns:
            Attention weight of each row, mean over the question's rows and the heads, at each
            layer: ``(L, B, S)``.
        """

    def auxiliary_attention(self, model: str) -> Tensor:
        """Computes the whole prompt with another model that has the same tokenizer.

        Args:
            model: Folder or repository name, a name that the engine was given a model for, or
                ``self`` for the served model.

        Returns:
            Attention weight of each row at that model's last layer, mean over the question's
            rows and the heads: ``(B, S)``.

        Raises:
            ValueError: If there is no such model, or its tokenizer is another one.
        """

    def outside_attention(self) -> Tensor:
        """Computes the first layer in full.

        Returns:
            Share of each row's attention that goes to rows outside its own chunk, mean over the
            heads, ``(B, S)``. It is half the sum of what the row's weights change by when it may
            see them (total variation): its weights inside only shrink by one factor.
        """

    def full_prefill(self) -> Truth:
        """Computes everything and compares it with the cache, which no real method can."""
