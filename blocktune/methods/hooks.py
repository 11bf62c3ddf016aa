"""Two hooks for methods that need more than a layout, a selector and a reshape.

- `Method.history` takes chunks from earlier prompts (`PromptHistory`).
- `Method.loader` looks chunks up, in the store and elsewhere (`ChunkLoader`).

The engine calls them without knowing the method; ``blocktune/extras`` has an example of each. Both
get the store of the engine's chunks and the fingerprint of its model. State that lasts between
requests goes into the store as entries, or, for this process only, into `ChunkStore.memoized`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor, nn

    from blocktune.cache import ChunkStore, Lookup, RowCache
    from blocktune.layout import Rows
    from blocktune.positions import RopeSpec
    from blocktune.prompt import Pieces

Ids = tuple[int, ...]


class PrefilledBatch(NamedTuple):
    """A batch after its prefill.

    If a prompt was computed in full, the tokens of its chunks have the group `GLOBAL`.
    ``chunk_attention`` is only filled for rows of the question and of prompts computed in full.
    """

    pieces: Sequence[Pieces]  # the prompts
    columns: Rows  # what the cache's columns are, (B, N)
    cache: RowCache  # keys and values of all columns
    chunk_attention: Tensor | None  # each row's attention to each chunk, (B, N, C), if watched


class ServedModel(NamedTuple):
    """The parts of the model that a history may use."""

    embed: nn.Embedding  # token embeddings
    rope: RopeSpec  # how it rotates keys
    max_tokens: int  # context length


class PromptHistory(ABC):
    """Serves chunks as computed in earlier prompts or after other chunks, not encoded alone."""

    begins_in_full: ClassVar[bool] = True  # whether a prompt without a history is computed in full
    watches_chunks: ClassVar[bool] = True  # `update` reads ``chunk_attention``, which costs time

    @abstractmethod
    def lookup(
        self, store: ChunkStore, fingerprint: str, pieces: Pieces, model: ServedModel
    ) -> list[Ids] | None:
        """Returns, for each chunk of a prompt, the tokens that the entry to use was encoded after.

        They give its key (`blocktune.cache.key_after`). None: the prompt is computed in full.
        """

    @abstractmethod
    def update(self, store: ChunkStore, fingerprint: str, batch: PrefilledBatch) -> None:
        """Learns from a served batch; called after its first token."""

    def without_selection(self) -> PromptHistory:
        """The same history for a method with another selector or with a budget."""
        return self


class DamagedChunk(ValueError):
    """A chunk that was already returned turns out to be damaged: the batch is started again."""


class ChunkLoader(ABC):
    """Looks up the chunks of one batch; missing ones are encoded."""

    @abstractmethod
    def lookup(self, key: str, token_ids: Sequence[int] | Tensor, fingerprint: str) -> Lookup:
        """As `ChunkStore.lookup`."""
