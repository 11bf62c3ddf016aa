"""A reuse method as a choice on four independent axes, and the registry of named methods.

A published method is a preset: one class in ``presets/`` that chooses a layout, a selector, a
repair and a reshape, see `Method`. Importing torch is left to functions, here and in presets,
selectors, repairs and reshapes, so that listing the methods is fast.

Two hooks serve methods that need more: `Method.history` takes chunks from earlier prompts, and
`Method.loader` looks chunks up. The engine calls them without knowing the method; both get the
store of its chunks and the fingerprint of its model. State that lasts between requests goes into
the store as entries, or, for this process only, into `ChunkStore.memoized`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from blocktune.methods.select.base import Nothing, Selection
from blocktune.methods.select.budget import matched
from blocktune.prompt.layout_spec import LayoutSpec
from blocktune.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor, nn

    from blocktune.cache import ChunkStore, Lookup, RowCache
    from blocktune.layout import Rows
    from blocktune.methods.repair import Repair
    from blocktune.methods.reshape import Reshape
    from blocktune.positions import RopeSpec
    from blocktune.prompt import Pieces

Ids = tuple[int, ...]
METHODS = Registry("reuse method", "blocktune.methods.presets")
register = METHODS.register
available = METHODS.available

BOTH_LEARNED = (
    "no method serves an adapter with link tokens and learned tokens around chunks at once; train "
    "one with num_links alone (kvlink), or with num_headers and num_trailers alone (kv-packet)"
)
"""Why an adapter with both kinds of learned tokens is refused."""


def encoded_alone(spec: LayoutSpec, **changes: Any) -> LayoutSpec:
    """``spec`` with ``changes``; if these say no other, chunks are encoded alone, without a BOS.

    A changed ``placement`` is one without reserved slots.
    """
    if "placement" in changes:
        changes = {"slot": 0} | changes
    alone = {"block": True, "num_blanks": 0, "shared_prefix": False, "bos": "none"}
    return replace(spec, **alone | changes)


class Cached(Enum):
    """What a method takes from a cache instead of computing it."""

    NOTHING = "nothing"
    EXACT_PREFIX = "exact prefix"
    CHUNKS = "chunks"


class Weights(Enum):
    """What a model must be trained for, to run a method as its paper describes it."""

    ANY = "any"
    BLOCK = "block attention"
    LINKS = "link tokens"
    WRAPS = "learned tokens around chunks"


class Axis(Enum):
    """A choice that a method makes; the value names the member of `Method` that makes it."""

    LAYOUT = "layout"
    SELECT = "select"
    REPAIR = "repair"
    RESHAPE = "reshape"


class PrefilledBatch(NamedTuple):
    """A batch after its prefill, for `PromptHistory.update`.

    Chunks of a prompt that was computed in full have the group `GLOBAL`. ``chunk_attention`` is
    only filled for rows of these and of the question.
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


@dataclass(frozen=True)
class Method:
    """A reuse method. Subclasses are frozen dataclasses; their fields are their parameters."""

    source: ClassVar[str] = ""  # paper or code it follows
    weights: ClassVar[Weights] = Weights.ANY  # what the model must be trained for
    cached: ClassVar[Cached] = Cached.CHUNKS  # what comes from a cache
    # Serves chunks as earlier prompts computed them; None: each chunk is encoded alone.
    history: ClassVar[PromptHistory | None] = None
    # Number of prompts over the same chunks, in other orders, that are served untimed before each
    # question: the history for measurements that begin with empty caches.
    warm_up: ClassVar[int] = 0
    keeps_context: ClassVar[bool] = True  # False: the baseline without chunks
    # Share of the context's layer-tokens to recompute; None: by the selector's parameters.
    layer_budget: ClassVar[float | None] = None

    @property
    def name(self) -> str:
        """The name it is registered under."""
        return METHODS.name_of(self)

    @property
    def axes(self) -> frozenset[Axis]:
        """The axes that it decides; on the others it does the same as naive reuse."""
        own = type(self)
        return frozenset(a for a in Axis if getattr(own, a.value) is not getattr(Method, a.value))

    def layout_for(self, trained: LayoutSpec | None) -> LayoutSpec:
        """The layout to serve with, given the one that the model's adapter was trained with.

        Raises ValueError if the method needs another adapter, or other learned tokens.
        """
        # An adapter trained in full attention has no layout of chunks to serve.
        is_block = trained is not None and trained.block
        spec = trained if is_block else LayoutSpec()
        links, wraps = spec.num_links, spec.num_headers + spec.num_trailers
        is_met, recipe = {
            Weights.ANY: (True, ""),
            Weights.BLOCK: (is_block and not links, "recipes/block_attention.yaml"),
            Weights.LINKS: (links, "recipes/kvlink.yaml"),
            Weights.WRAPS: (wraps, "num_headers and num_trailers"),
        }[self.weights]
        if not is_met:
            given = "one without" if is_block else "none"
            if self.weights is Weights.BLOCK and links:
                given = "one with link tokens (use 'kvlink')"
            raise ValueError(
                f"method '{self.name}' needs an adapter trained with {self.weights.value}, got "
                f"{given}; train one with {recipe}, and give it: --adapter, `adapter:` in a suite"
            )
        spec = self.layout(spec)  # a method in full attention has no learned tokens
        links, wraps = spec.num_links, spec.num_headers + spec.num_trailers
        if links and wraps:
            raise ValueError(BOTH_LEARNED)
        in_full = self.history is not None and self.history.begins_in_full
        if wraps and in_full:
            raise ValueError(
                f"method '{self.name}' reuses chunks of prompts computed in full, which lack this "
                "adapter's learned tokens around chunks; drop the adapter, or use 'kv-packet'"
            )
        before = [*spec.sinks, *["bos"] * (spec.keeps_bos and in_full)]
        if self.history is not None and before:
            raise ValueError(
                f"method '{self.name}' decides itself what its chunks are encoded after; leave out "
                f"layout {before[0]}"
            )
        learned = (links, Weights.LINKS, "kvlink"), (wraps, Weights.WRAPS, "kv-packet")
        for count, weights, preset in learned:
            if count and self.weights is not weights:
                raise ValueError(
                    f"method '{self.name}' does not serve {weights.value}, which the adapter was "
                    f"trained with; use '{preset}', or compose: '{preset} + {self.name}'"
                )
        return spec

    @property
    def reuses_chunks(self) -> bool:
        """Whether chunks come from a cache, at any place in the prompt."""
        return self.cached is Cached.CHUNKS

    def layout(self, spec: LayoutSpec) -> LayoutSpec:
        """Axis layout: places of chunks and what precedes them, given the trained layout."""
        return spec

    def select(self) -> Selection:
        """Axis select: which context tokens are recomputed."""
        return Nothing()

    def select_for(self, num_layers: int) -> Selection:
        """The selector for a model of ``num_layers``, at the layer budget if there is one.

        Raises ValueError if the budget cannot be met.
        """
        if self.layer_budget is None:
            return self.select()
        return matched(self.select(), self.layer_budget, num_layers)

    def repair(self) -> Repair | None:
        """Axis repair: how reused keys and values are changed; None changes nothing."""
        return None

    def reshape(self) -> Reshape | None:
        """Axis reshape: how later rows attend to reused keys; None changes nothing."""
        return None

    def prefixes(self, store: ChunkStore, read: Callable[[Sequence[int]], str]) -> Any:
        """Its own cache of exact prefixes, used like a `PrefixTree`; None: the engine's tree.

        ``read`` turns token ids into text.
        """
        return None

    def loader(self, store: ChunkStore, fingerprint: str) -> ChunkLoader | None:
        """Looks up the chunks of a batch; None: the store does."""
        return None
