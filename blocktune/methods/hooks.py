"""Two hooks for methods that need more than a layout, a selector and a reshape.

- `Method.history`: chunks come out of earlier prompts (`PromptHistory`).
- `Method.loader`: chunks are looked up elsewhere than in the store alone (`ChunkLoader`).

The engine calls them and names no method; ``blocktune/extras`` has an example of each. Both are
told which store holds an engine's chunks, and the fingerprint of its model. What a hook must keep
between requests goes into the store as entries, or, for this process only, into `ChunkStore.notes`.
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

    A chunk's tokens have the group `GLOBAL` if its prompt was computed in full. ``chunk_attention``
    is made for rows of the question and of prompts computed in full.
    """

    pieces: Sequence[Pieces]  # the prompts
    columns: Rows  # facts of the cache's columns, (B, N)
    cache: RowCache  # keys and values of all columns
    chunk_attention: Tensor


class ServedModel(NamedTuple):
    """What a history may ask of the model beside its fingerprint."""

    embed: nn.Embedding  # of its tokens
    rope: RopeSpec  # how it rotates keys


class PromptHistory(ABC):
    """Serves chunks as earlier prompts computed them, or after others, instead of each alone."""

    exact_alone: bool = False  # whether one chunk with nothing before it equals full prefill
    begins_in_full: ClassVar[bool] = True  # whether a prompt without a history is computed in full

    @abstractmethod
    def lookup(
        self, store: ChunkStore, fingerprint: str, pieces: Pieces, model: ServedModel
    ) -> list[Ids] | None:
        """The tokens that each chunk of a prompt was encoded after, in the entry to be used.

        Entries are named by `blocktune.cache.key_after`. None: this prompt is computed in full.
        """

    @abstractmethod
    def update(self, store: ChunkStore, fingerprint: str, batch: PrefilledBatch) -> None:
        """Learns from a batch that was served; runs after its first token."""

    def without_selection(self) -> PromptHistory:
        """The same where the tokens to recompute are chosen by another selector or a budget."""
        return self


class DamagedChunk(ValueError):
    """A chunk that was already handed out is not what was written: the batch starts again."""


class ChunkLoader(ABC):
    """Finds the chunks of one batch; those that it does not find are encoded."""

    @abstractmethod
    def lookup(self, key: str, token_ids: Sequence[int] | Tensor, fingerprint: str) -> Lookup:
        """As `ChunkStore.lookup`."""
