"""What a selector may ask for before the first layer: passes of a model that score tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from blocktune.cache import ChunkStore
    from blocktune.prompt import Batch, Pieces


class Truth(NamedTuple):
    """What a full prefill knows that reuse does not; layer by layer, at every row of the layout.

    Attributes:
        key_deviation: Distance of the true keys from the cached ones, ``(L, B, S)``.
        value_deviation: Likewise of the values.
        query_attention: Attention that the question pays each row, ``(L, B, S)``, see
            `Passes.query_attention`.
    """

    key_deviation: Tensor
    value_deviation: Tensor
    query_attention: Tensor


class Passes(Protocol):
    """Passes that an engine runs when a selector asks; each is counted in the answer's usage.

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
        """The question computed over the reused cache, before anything is recomputed.

        Returns:
            Attention weight of each row, mean over the question's rows and the heads, at each
            layer: ``(L, B, S)``.
        """

    def auxiliary_attention(self, model: str) -> Tensor:
        """The whole prompt computed by another model with the same tokenizer.

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
        """The first layer computed in full.

        Returns:
            Share of each row's attention that goes to rows outside its own chunk, mean over the
            heads, ``(B, S)``. It is half the sum of what the row's weights change by when it may
            see them (total variation): its weights inside only shrink by one factor.
        """

    def full_prefill(self) -> Truth:
        """Everything computed, and compared with the cache: knowledge that no method has."""
