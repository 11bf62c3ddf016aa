"""The interface of a selector, its inputs, and the two trivial selectors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

from blocktune.registry import Registry, require_like, require_one_of, require_share

if TYPE_CHECKING:
    from torch import Tensor

    from blocktune.cache import ChunkStore
    from blocktune.layout import Layout
    from blocktune.prompt import Batch, Pieces

SELECTORS = Registry("selector", "blocktune.methods.select")
"""A file of ``select/`` or a plug-in registers a class with ``@SELECTORS.register("name")``."""


class Selection(ABC):
    """Chooses the context tokens to recompute; subclasses are frozen dataclasses.

    A simple selector only defines `start`. For each batch the engine calls, in this order, `begin`
    (by default `start`; override it if you need scores); `widen` for every layer of `widens`, to
    add tokens there; then, in the forward pass, `refine` at every layer of `checks`, to drop some.
    A field ``ratio`` is the share of the context tokens to recompute, in [0, 1].
    """

    source: ClassVar[str] = ""  # paper or code it follows
    watches_chunks: ClassVar[bool] = False  # `refine` reads the question's attention to chunks
    needs_question: ClassVar[bool] = False  # a cache of the context then serves one question only
    whole_layers = False  # a layer recomputes all context tokens or none
    # Whether a row that `refine` drops keeps the keys and values that were computed for comparison
    # in that layer (as in CacheBlend's code), instead of the cached ones.
    keeps_keys: bool = False
    # Reproduces the mask of CacheBlend's code, by which row ``r`` of ``R`` computed rows sees all
    # but the last ``R - 1 - r`` columns. Do not serve with it.
    sees_future: bool = False
    # What a recomputed token attends to: ``all`` before it, or in chunks only the tokens that are
    # ``chosen`` in some layer or exact anyway.
    sees: str = "all"

    def __post_init__(self):
        ratio, default = getattr(self, "ratio", None), getattr(type(self), "ratio", None)
        if (ratio, default) != (None, None):
            require_share("ratio", ratio)
        require_one_of("sees", self.sees, ("all", "chosen"))

    def with_budget(self, ratio: float) -> Selection:
        """The same selector with a share of the context tokens; ValueError if it takes none.

        0 selects nothing, 1 everything. Override it if the share is not the field ``ratio``.
        """
        if "ratio" not in {field.name for field in fields(self)}:
            raise ValueError(
                f"selector '{SELECTORS.name_of(self)}' takes no budget; leave the budget out"
            )
        return replace(self, ratio=ratio)

    def spends(self, num_layers: int) -> float | None:
        """Share of the context's layer-tokens that it recomputes; None if it depends on the prompt.

        Scoring passes and probes do not count.
        """
        return getattr(self, "ratio", None)

    @property
    def min_layers(self) -> int:
        """Smallest number of layers that a model must have."""
        return 1

    @abstractmethod
    def start(self, layout: Layout) -> Tensor:
        """Tokens recomputed from layer 0 on: bool ``(B, S)``, only where ``layout.is_context``."""

    def begin(self, layout: Layout, passes: Passes) -> Tensor:
        """What the engine calls: `start`, or for a scored selector a choice by ``passes``.

        Returns as `start`, or in int64 how many layers, from the first, recompute each token.
        """
        return self.start(layout)

    def checks(self, num_layers: int) -> tuple[int, ...]:
        """Layers (0-based, rising) at whose entry `refine` drops rows."""
        return ()

    def refine(self, check: LayerCheck) -> Tensor:
        """Rows recomputed from this layer on: bool ``(B, R)``, only where ``check.eligible``."""
        raise AssertionError(f"{type(self).__name__} has no check layer")

    def widens(self, num_layers: int) -> tuple[int, ...]:
        """Layers (0-based) at whose entry `widen` adds rows; none of them is in `checks`.

        An added row starts from the hidden state that was stored when its chunk was encoded.
        """
        return ()

    def widen(self, layer: int, layout: Layout) -> Tensor:
        """Tokens that are also recomputed from ``layer`` on; bool ``(B, S)``."""
        return selectable(layout)


class Truth(NamedTuple):
    """What only a full prefill shows, for each layer and row of the layout, ``(L, B, S)`` each."""

    key_deviation: Tensor  # distance of the true keys from the cached ones
    value_deviation: Tensor
    query_attention: Tensor  # as `Passes.query_attention`, but in the full prefill


@dataclass(frozen=True)
class QueryScores:
    """How the question's attention over the reused cache becomes one score per token.

    A row's weights sum to 1 over the keys of the whole ``prompt``, of what is ``cached`` (prefix
    and chunks) or of the ``chunks``. Keys are at the positions of the ``prompt``, or where each
    chunk was ``encoded``, from 0, with the question after the longest.
    """

    over: str = "prompt"
    pool: str = "mean"  # over the question's rows: ``mean``, or Euclidean ``norm``
    positions: str = "prompt"
    depth: int | None = None  # number of layers to compute and read, from the first; None: all

    def __post_init__(self):
        require_one_of("over", self.over, ("prompt", "cached", "chunks"))
        require_one_of("pool", self.pool, ("mean", "norm"))
        require_one_of("positions", self.positions, ("prompt", "encoded"))


class Passes(Protocol):
    """Forward passes that the engine runs on request; each is counted in the answer's usage.

    All scores are float32, and 0 at rows without a column in the cache (blanks, padding).
    """

    batch: Batch  # the prompts, stacked
    pieces: Sequence[Pieces]  # their tokens, chunk by chunk
    store: ChunkStore  # for selectors that keep their own entries beside the chunks
    fingerprint: str  # the model's, for keys of the store

    def query_attention(self, how: QueryScores | None = None) -> Tensor:
        """Attention weights of the question over the reused cache, before anything is recomputed.

        One number per row at each layer that ``how`` reads (None: its defaults), ``(L, B, S)``.
        """

    def auxiliary_attention(self, model: str) -> Tensor:
        """Computes the whole prompt with another model that has the same tokenizer.

        ``model`` is a folder, a repository, a name known to the engine, or ``self`` for the served
        model. Returns ``(B, S)``: each row's attention weight in the last layer, mean over the
        question's rows and the heads. Raises ValueError if ``model`` cannot be found.
        """

    def outside_attention(self) -> Tensor:
        """Share of each row's first-layer attention that leaves its chunk, mean over heads, (B, S).

        It is the total variation between the row's weights with and without the rows outside.
        """

    def full_prefill(self) -> Truth:
        """Computes everything and compares it with the cache, which no real method can."""


class LayerKV(NamedTuple):
    """Keys and values of some rows in one layer, each ``(B, K, R, D)``."""

    keys: Tensor
    values: Tensor


@dataclass(frozen=True)
class LayerCheck:
    """The entry of a layer, where `Selection.refine` can drop rows.

    ``question_mass`` is the question's attention to each chunk in the layers below, ``(B, C)``, if
    the selector watches chunks. ``probe`` projects this layer's keys and values of all rows; to
    save this cost, it only runs when `fresh` or `cached` is read.
    """

    layer: int  # 0-based
    num_layers: int  # of the model
    eligible: Tensor  # computed rows that are context tokens, (B, R) bool
    context_tokens: Tensor  # number in each prompt, (B,)
    cached_tokens: Tensor  # the same, with a cached prefix
    chunk: Tensor  # index of each row's chunk, (B, R); -1 outside of chunks
    question_mass: Tensor | None
    probe: Callable[[], tuple[LayerKV, LayerKV]]

    @cached_property
    def _states(self) -> tuple[LayerKV, LayerKV]:
        return self.probe()

    @property
    def fresh(self) -> LayerKV:
        """The rows' keys and values as computed now, in the context of their prompt."""
        return self._states[0]

    @property
    def cached(self) -> LayerKV:
        """The rows' cached keys and values, relocated; arbitrary where not ``eligible``."""
        return self._states[1]


def selectable(layout: Layout) -> Tensor:
    """Context tokens whose cached state can differ from a full prefill, ``(B, S)`` bool.

    A chunk at the very start of the prompt is exact, unless it was encoded after blanks.
    """
    from blocktune.layout import Kind

    blanks = (layout.kind == Kind.BLANK).any(dim=1, keepdim=True)
    return layout.is_context & ((layout.order - layout.offset > 0) | blanks)


def require_context(selection: Selection, chosen: Tensor, layout: Layout, *dtypes: Any) -> None:
    """Raises ValueError unless a selector chose context tokens, in one of the ``dtypes``."""
    what = f"selector '{SELECTORS.name_of(selection)}'"
    require_like(what, chosen, layout.is_context, *dtypes)
    if bool(((chosen > 0) & ~layout.is_context).any()):
        raise ValueError(f"{what} chose rows outside of `layout.is_context`; leave these out")


@SELECTORS.register("nothing")
class Nothing(Selection):
    """Recomputes no token: naive reuse."""

    whole_layers = True
    share: ClassVar[float] = 0.0

    def spends(self, num_layers: int) -> float:
        return self.share

    def start(self, layout: Layout) -> Tensor:
        return layout.is_context & (self.share > 0)


@SELECTORS.register("everything")
class Everything(Nothing):
    """Recomputes every context token: equal to full prefill, the upper bound."""

    share: ClassVar[float] = 1.0
