"""A reuse method as a choice on independent axes, and the table of the named ones.

Place and Encode are fields of the prompt's `LayoutSpec` (where chunks stand; what they are encoded
after), Select is a `Selection`, Reshape a `Reshape`, and Weights says what the model must have been
trained for. A published method is one file in ``presets/`` that makes these choices.
"""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

from blocktune.cache import ChunkStore
from blocktune.methods.hooks import ChunkLoader, PromptHistory
from blocktune.methods.reshape import Reshape
from blocktune.methods.select import Nothing, Selection, matched
from blocktune.prompt import LayoutSpec
from blocktune.registry import Registry

METHODS = Registry("reuse method", "blocktune.methods.presets")
register = METHODS.register
available = METHODS.available


BOTH_LEARNED = (
    "no method serves an adapter with link tokens and learned tokens around chunks at once; train "
    "one with num_links alone (kvlink), or with num_headers and num_trailers alone (kv-packet)"
)
"""Why an adapter with both kinds of learned tokens is refused."""


class Cached(Enum):
    """What a method takes from caches instead of computing it."""

    NOTHING = "nothing"
    EXACT_PREFIX = "exact prefix"
    CHUNKS = "chunks"


class Weights(Enum):
    """What a model must have been trained for, for the method to mean what its paper means."""

    ANY = "any"
    BLOCK = "block attention"
    LINKS = "link tokens"
    WRAPS = "learned tokens around chunks"


class Axis(Enum):
    """A choice that a method makes; the value is the method of `Method` that makes it."""

    LAYOUT = "layout"
    SELECT = "select"
    RESHAPE = "reshape"


def require_count(name: str, value: int, least: int = 0) -> None:
    """Refuses a parameter that is no whole number of things.

    Raises:
        ValueError: If it is no integer or below ``least``.
    """
    if type(value) is not int or value < least:
        raise ValueError(f"{name} must be a whole number, at least {least}, got {value!r}")


GIVE_IT = "give it by --adapter, in a suite by the entry's `adapter:`"


@dataclass(frozen=True)
class Method(ABC):
    """A composition. Subclasses are presets: their fields, all with defaults, are their YAML keys.

    Class attributes:
        source: Paper or code it follows.
        weights: What the model must be trained for.
        cached: What comes from caches.
        history: Where chunks of earlier prompts come from, a `PromptHistory`; None: each is encoded
            alone.
        warm_up: Prompts over the same chunks that are served before each one, in full, in another
            order and off the clock: a history for measurements that begin with empty caches.
        keeps_context: False only for the baseline that answers without chunks.
        exact_on_one_chunk: Whether one chunk with nothing before it equals full prefill.
        layer_budget: Share of the context's layer-tokens that it shall spend, or None: what comes
            of its selector's own parameters.
    """

    source: ClassVar[str]
    weights: ClassVar[Weights] = Weights.ANY
    cached: ClassVar[Cached] = Cached.CHUNKS
    history: ClassVar[PromptHistory | None] = None
    warm_up: ClassVar[int] = 0
    keeps_context: ClassVar[bool] = True
    exact_on_one_chunk: ClassVar[bool] = True
    layer_budget: ClassVar[float | None] = None

    @property
    def name(self) -> str:
        """What it is registered under."""
        return METHODS.name_of(self)

    @property
    def axes(self) -> frozenset[Axis]:
        """The axes that it decides; on the others it is plain reuse."""
        own = type(self)
        return frozenset(a for a in Axis if getattr(own, a.value) is not getattr(Method, a.value))

    def layout_for(self, trained: LayoutSpec | None) -> LayoutSpec:
        """How the prompt's rows are laid out, for a model's weights.

        Args:
            trained: The layout that the model's adapter was trained for, or None without one.

        Raises:
            ValueError: If the method needs an adapter that this is not, or would serve learned
                tokens without saying so.
        """
        self._require(trained)
        # An adapter that was trained in full attention has no layout of chunks to serve.
        is_block = trained is not None and trained.block
        spec = self.layout(trained if is_block else LayoutSpec())
        if spec.num_links and spec.num_headers + spec.num_trailers:
            raise ValueError(BOTH_LEARNED)
        if spec.num_links and self.weights is not Weights.LINKS:
            raise ValueError(
                f"method '{self.name}' does not say that it serves link tokens, which the adapter "
                f"was trained with; use 'kvlink', or compose them: 'kvlink + {self.name}'"
            )
        if (spec.num_headers or spec.num_trailers) and self.weights is not Weights.WRAPS:
            raise ValueError(
                f"method '{self.name}' does not say that it serves learned tokens around chunks, "
                f"which the adapter was trained with; use 'kv-packet', or compose them: "
                f"'kv-packet + {self.name}'"
            )
        return spec

    def layout(self, spec: LayoutSpec) -> LayoutSpec:
        """Place and Encode: what the method changes of the layout that the weights ask for."""
        return spec

    def select(self) -> Selection:
        """Select: which tokens are computed afresh."""
        return Nothing()

    def select_for(self, num_layers: int) -> Selection:
        """The selection in a model of so many layers, at the layer budget if there is one.

        Raises:
            ValueError: If the budget cannot be met.
        """
        selection = self.select()
        if self.layer_budget is None:
            return selection
        return matched(selection, self.layer_budget, num_layers)

    def reshape(self) -> Reshape | None:
        """Reshape: how later rows see reused keys; None leaves them as they are."""
        return None

    def loader(self, store: ChunkStore, fingerprint: str) -> ChunkLoader | None:
        """What loads the chunks of a batch; None: the engine, all of them at once.

        Args:
            store: Holds the chunks.
            fingerprint: Of the model.
        """
        return None

    def _require(self, trained: LayoutSpec | None) -> None:
        is_block = trained is not None and trained.block
        has_wraps = is_block and trained.num_headers + trained.num_trailers > 0
        if self.weights is Weights.WRAPS and not has_wraps:
            raise ValueError(
                f"method '{self.name}' needs an adapter trained with learned tokens around chunks, "
                f"got {'one without' if is_block else 'none'}; train one with num_headers and "
                f"num_trailers; {GIVE_IT}"
            )
        has_links = is_block and trained.num_links > 0
        if self.weights is Weights.BLOCK and (not is_block or has_links):
            came = "one with link tokens (use 'kvlink')" if has_links else "none"
            raise ValueError(
                f"method '{self.name}' needs an adapter trained with block attention, got "
                f"{came}; train one with recipes/block_attention.yaml; {GIVE_IT}"
            )
        if self.weights is Weights.LINKS and not has_links:
            raise ValueError(
                f"method '{self.name}' needs an adapter trained with link tokens, got "
                f"{'one without' if is_block else 'none'}; train one with recipes/kvlink.yaml; "
                f"{GIVE_IT}"
            )
