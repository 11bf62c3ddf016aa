"""Which rows a forward pass computes in which layer, as a plan that a stock model carries along.

The model embeds every row that any layer will need (the *universe*), so that their positions are
rotated once, by the model itself. Each layer is then fed the rows that it shall compute: rows are
dropped at a check, and come back with the states that their chunks carried into a layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from blocktune.attention.cached import CachePlan, Reshaping
from blocktune.attention.kernels import Knobs
from blocktune.cache import SKIP, RowCache
from blocktune.engine.account import Stopwatch
from blocktune.engine.chunk_mass import ChunkMass
from blocktune.engine.rows import Computed, left_padded
from blocktune.layout import GLOBAL, Kind, LayerRule, Rows
from blocktune.select import Check, Selection, States


class _StatesMade(Exception):
    """Ends a layer's forward once its keys and values are made: nothing else of it is wanted."""

    def __init__(self, states: States):
        self.states = states


@dataclass(frozen=True)
class Course:
    """What decides the rows of each layer.

    Attributes:
        start: Rows of the universe that the first layer computes, ``(B, U)`` bool.
        widen: Rows that are added at the entry of a layer, ``(B, U)`` bool, by layer.
        states: What each column's token carried into that layer, ``(B, N, hidden)``, by layer.
        selection: Asked at its check layers.
    """

    start: Tensor
    widen: Mapping[int, Tensor]
    states: Mapping[int, Tensor]
    selection: Selection


class Schedule:
    """A plan whose rows change from layer to layer; for one forward pass.

    Attributes:
        plans: What attended, each with the layers it did so in.
        mass: What the question paid chunks, where the selector watches them; else None.
        probes: Plans of whose rows a layer made keys and values for a choice only, by layer.
    """

    def __init__(
        self,
        universe: Computed,
        columns: Rows,
        cache: RowCache,
        course: Course,
        watch: Stopwatch,
        reshaping: Reshaping | None = None,
    ):
        """Selects the universe's columns; from the first layer on, `enter` narrows them."""
        self.universe, self.columns, self.cache = universe, columns, cache
        self.course, self.watch, self.reshaping = course, watch, reshaping
        self.plans: list[CachePlan] = []
        self.probes: dict[int, CachePlan] = {}
        self._checks = frozenset(course.selection.checks(len(cache)))
        self._exists = universe.rows.kind != Kind.PAD
        self._context = universe.rows.kind == Kind.CHUNK
        self._index: Tensor | None = None  # of the current rows in the universe; None: all
        self._picked: dict[int, tuple] = {}
        self.mass = ChunkMass(columns) if course.selection.watches_chunks else None
        self._go_on(0, universe)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, rule: LayerRule, knobs: Knobs
    ) -> Tensor:
        """See `Plan.attend`: by the plan of the layer's rows."""
        if self.mass is not None:
            self.mass.read(self.plans[-1].query, query, key, rule, knobs)
        return self.plans[-1].attend(query, key, value, rule, knobs)

    def enter(self, index: int, layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """What layer ``index`` is fed instead of what the model hands it: a forward pre-hook."""
        hidden = args[0]
        if index == 0 and not torch.equal(self.course.start, self._exists):
            hidden = self._change(index, hidden, self.course.start)
        if index in self._checks:
            hidden = self._narrow(index, layer, (hidden, *args[1:]), kwargs)
        if index in self.course.widen:
            widened = self._mask() | self.course.widen[index]
            hidden = self._change(index, hidden, widened)
        return (hidden, *args[1:]), self._of_current_rows(kwargs)

    def _narrow(self, index: int, layer: nn.Module, args: tuple, kwargs: dict) -> Tensor:
        """Asks the selection which rows stay."""
        self.watch.stop("recompute_s")
        rows = self.plans[-1].query
        exists = rows.kind != Kind.PAD
        column = rows.order.clamp(min=0)
        # What no cache holds cannot be dropped: nothing would take its place.
        is_cached = self.columns.group.gather(1, column) != GLOBAL
        eligible = (rows.kind == Kind.CHUNK) & is_cached
        made: list[States] = []

        def probe() -> tuple[States, States]:
            made.append(self._probe(index, layer, args, self._of_current_rows(kwargs)))
            self.probes[index] = self.plans[-1]
            return made[0], States(*self.cache.held(index))

        check = Check(
            layer=index,
            num_layers=len(self.cache),
            eligible=eligible,
            context_tokens=(self.columns.kind == Kind.CHUNK).sum(1),
            prompt_tokens=(self.columns.kind != Kind.PAD).sum(1),
            other_tokens=(exists & ~eligible).sum(1),
            chunk=rows.chunk,
            question_mass=None if self.mass is None else self.mass.of_question(),
            probe=probe,
        )
        kept = self.course.selection.refine(check) & eligible
        if made and self.course.selection.keeps_keys:
            self.cache.store(index, *made[0])
            if self.reshaping is not None:
                written = self.universe.columns.gather(1, self._current()[0])
                self.reshaping.wrote(index, written.masked_fill(~exists, SKIP))
        mask = self._spread(kept | (exists & ~eligible))
        hidden = self._change(index, args[0], mask)
        self.watch.stop("select_s")
        return hidden

    def _probe(self, index: int, layer: nn.Module, args: tuple, kwargs: dict) -> States:
        def stop(keys: Tensor, values: Tensor) -> None:
            raise _StatesMade(States(keys, values))

        self.cache.observe(index, stop)
        try:
            layer.forward(*args, **kwargs)
        except _StatesMade as made:
            return made.states
        finally:
            self.cache.observe(index, None)
        raise AssertionError(f"layer {index} never updated its cache")

    def _change(self, layer: int, hidden: Tensor, mask: Tensor) -> Tensor:
        """From the current rows to those of ``mask`` ``(B, U)``; returns their hidden states."""
        whole = hidden.new_zeros(*mask.shape, hidden.shape[-1])
        if layer in self.course.states and layer in self.course.widen:
            columns = self.universe.columns.clamp(min=0)
            states = self.course.states[layer]
            whole = states.gather(1, _as_index(columns, states)).to(hidden.dtype)
        index, exists = self._current()
        prompt, row = exists.nonzero(as_tuple=True)
        whole[prompt, index[prompt, row]] = hidden[prompt, row]
        self._index, exists = left_padded(mask, self.universe.rows.order)
        self._picked = {}
        self._go_on(layer, self.universe.take(self._index, exists))
        return whole.gather(1, _as_index(self._index, whole))

    def _go_on(self, layer: int, rows: Computed) -> None:
        """Computes ``rows`` from ``layer`` on."""
        if self.plans and not self.plans[-1].executed:
            self.plans.pop()  # the universe, where the first layer computes less of it
        facts = rows.rows
        if self.course.selection.sees_future and layer >= min(self._checks, default=0):
            facts = _seeing_future(facts, self.columns)
        self.plans.append(CachePlan(facts, self.columns, self.reshaping, rows.columns))
        self.cache.select(rows.columns, range(layer, len(self.cache)))

    def _current(self) -> tuple[Tensor, Tensor]:
        """Index in the universe of the current rows, and which of them are no padding."""
        if self._index is None:
            count = self._exists.shape[1]
            return torch.arange(count, device=self._exists.device).expand_as(self._exists), (
                self._exists
            )
        return self._index, self.plans[-1].query.kind != Kind.PAD

    def _mask(self) -> Tensor:
        """The current rows, ``(B, U)`` bool."""
        return self._spread(self._current()[1])

    def _spread(self, chosen: Tensor) -> Tensor:
        """Of the current rows ``(B, R)`` those that are chosen, as ``(B, U)``."""
        prompt, row = chosen.nonzero(as_tuple=True)
        mask = torch.zeros_like(self._exists)
        mask[prompt, self._current()[0][prompt, row]] = True
        return mask

    def _of_current_rows(self, kwargs: dict) -> dict:
        """What the model hands to every layer was made for the universe: picks current rows."""
        if self._index is None:
            return kwargs
        picked = {
            name: self._pick_once(kwargs[name])
            for name in ("position_embeddings", "position_ids")
            if kwargs.get(name) is not None
        }
        return kwargs | picked

    def _pick_once(self, value: Tensor | tuple) -> Tensor | tuple:
        # Layers share these tensors: each is picked once (and held, so that ids stay unique).
        if id(value) not in self._picked:
            parts = tuple(map(self._pick, value)) if isinstance(value, tuple) else self._pick(value)
            self._picked[id(value)] = (value, parts)
        return self._picked[id(value)][1]

    def _pick(self, tensor: Tensor) -> Tensor:
        """Rows ``(B, U, ...)``, or ``(1, U, ...)`` for all prompts, to the current ones."""
        whole = tensor.expand(len(self._index), *tensor.shape[1:])
        return whole.gather(1, _as_index(self._index, whole))


def _as_index(index: Tensor, rows: Tensor) -> Tensor:
    """``index`` ``(B, R)`` for gathering from ``rows`` ``(B, U, ...)``."""
    shape = (*index.shape, *rows.shape[2:])
    return index.view(*index.shape, *[1] * (rows.ndim - 2)).expand(shape)


def _seeing_future(query: Rows, columns: Rows) -> Rows:
    """The last row sees all columns, each row before it one less, wherever they stand."""
    exists = query.kind != Kind.PAD
    before_last = exists.flip(1).cumsum(1).flip(1) - 1
    order = columns.order.amax(1, keepdim=True) - before_last
    return Rows(**{**vars(query), "order": torch.where(exists, order, query.order)})
