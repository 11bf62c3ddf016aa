"""Which rows a forward pass computes in which layer, as a plan that a stock model follows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from blocktune.attention.cached import CachePlan, Reshaping
from blocktune.attention.kernels import AttentionParams
from blocktune.cache import RowCache
from blocktune.engine.attention_probes import ChunkAttention
from blocktune.engine.rows import Computed, left_padded
from blocktune.engine.usage import Stopwatch
from blocktune.layout import GLOBAL, Kind, LayerRule, Rows
from blocktune.methods.select import LayerCheck, LayerKV, Selection

PER_ROW = ("position_embeddings", "position_ids")
"""What a model hands to each of its layers besides hidden states, made for the rows it embedded."""


class RowSubset:
    """Some of the candidate rows.

    Attributes:
        rows: Their facts, ids and columns, ``(B, R)``.
        exists: Which are no padding, ``(B, R)`` bool.
        index: Of each in the candidates, ``(B, R)``.
    """

    def __init__(self, candidates: Computed, chosen: Tensor | None = None):
        """Takes the ``chosen`` rows ``(B, U)`` of the candidates; None: all."""
        self._candidates, self._all = candidates, chosen is None
        if chosen is None:
            self.rows, self.exists = candidates, candidates.rows.kind != Kind.PAD
            count = torch.arange(self.exists.shape[1], device=self.exists.device)
            self.index = count.expand_as(self.exists)
        else:
            self.index, self.exists = left_padded(chosen, candidates.rows.order)
            self.rows = candidates.take(self.index, self.exists)
        self._picked: dict[int, tuple[Any, Any]] = {}

    def of_candidates(self, chosen: Tensor) -> Tensor:
        """Of these rows ``(B, R)`` bool those that are chosen, among the candidates' ``(B, U)``."""
        prompt, row = chosen.nonzero(as_tuple=True)
        mask = torch.zeros_like(self._candidates.rows.kind, dtype=torch.bool)
        mask[prompt, self.index[prompt, row]] = True
        return mask

    def put(self, hidden: Tensor, whole: Tensor) -> None:
        """Writes these rows' states ``(B, R, hidden)`` into the candidates' ``(B, U, hidden)``."""
        prompt, row = self.exists.nonzero(as_tuple=True)
        whole[prompt, self.index[prompt, row]] = hidden[prompt, row]

    def pick(self, whole: Tensor) -> Tensor:
        """These rows of ``(B, U, ...)``, or of ``(1, U, ...)`` that is for all prompts."""
        whole = whole.expand(len(self.index), *whole.shape[1:])
        return whole.gather(1, as_index(self.index, whole))

    def arguments(self, kwargs: dict) -> dict:
        """A layer's keyword arguments, picked for these rows."""
        if self._all:
            return kwargs
        return kwargs | {
            name: self._pick_once(kwargs[name]) for name in PER_ROW if kwargs.get(name) is not None
        }

    def _pick_once(self, value: Tensor | tuple) -> Tensor | tuple:
        # Layers share these tensors: each is picked once (and held, so that ids stay unique).
        if id(value) not in self._picked:
            parts = tuple(map(self.pick, value)) if isinstance(value, tuple) else self.pick(value)
            self._picked[id(value)] = (value, parts)
        return self._picked[id(value)][1]


def as_index(index: Tensor, rows: Tensor) -> Tensor:
    """``index`` ``(B, R)`` for gathering from ``rows`` ``(B, U, ...)``."""
    shape = (*index.shape, *rows.shape[2:])
    return index.view(*index.shape, *[1] * (rows.ndim - 2)).expand(shape)


class _StatesMade(Exception):
    """Ends a layer's forward once its keys and values are made: nothing else of it is wanted."""

    def __init__(self, states: LayerKV):
        self.states = states


@dataclass(frozen=True)
class LayerSchedule:
    """What decides the rows of each layer.

    Attributes:
        start: Rows of the candidates that the first layer computes, ``(B, U)`` bool.
        widen: Rows that are added at the entry of a layer, ``(B, U)`` bool, by layer.
        states: What each column's token carried into that layer, ``(B, N, hidden)``, by layer.
        selection: Asked at its check layers.
        watches_chunks: Whether what rows pay chunks is read, for the selection or to be learnt.
    """

    start: Tensor
    widen: Mapping[int, Tensor]
    states: Mapping[int, Tensor]
    selection: Selection
    watches_chunks: bool = False


class SchedulePlan:
    """A plan whose rows change from layer to layer; for one forward pass.

    Attributes:
        plans: What attended, each with the layers it did so in.
        chunk_probe: What rows paid chunks, where that is read; else None.
        probes: Plans of whose rows a layer made keys and values for a choice only, by layer.
    """

    def __init__(
        self,
        candidates: Computed,
        columns: Rows,
        cache: RowCache,
        schedule: LayerSchedule,
        watch: Stopwatch,
        reshaping: Reshaping | None = None,
    ):
        """Selects the candidates' columns; from the first layer on, `enter` narrows them."""
        self.candidates, self.columns, self.cache = candidates, columns, cache
        self.schedule, self.watch, self.reshaping = schedule, watch, reshaping
        self.plans: list[CachePlan] = []
        self.probes: dict[int, CachePlan] = {}
        self._checks = frozenset(schedule.selection.checks(len(cache)))
        self.chunk_probe = ChunkAttention(columns) if schedule.watches_chunks else None
        self._go_on(0, RowSubset(candidates))

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, rule: LayerRule, params: AttentionParams
    ) -> Tensor:
        """See `Plan.attend`: by the plan of the layer's rows."""
        if self.chunk_probe is not None:
            self.chunk_probe.read(self.plans[-1].query, query, key, rule, params)
        return self.plans[-1].attend(query, key, value, rule, params)

    def enter(self, index: int, layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """What layer ``index`` is fed instead of what the model hands it: a forward pre-hook."""
        hidden = args[0]
        if index == 0 and not torch.equal(self.schedule.start, self._current.exists):
            hidden = self._change(index, hidden, self.schedule.start)
        if index in self._checks:
            hidden = self._narrow(index, layer, (hidden, *args[1:]), kwargs)
        if index in self.schedule.widen:
            widened = self._current.of_candidates(self._current.exists) | self.schedule.widen[index]
            hidden = self._change(index, hidden, widened)
        return (hidden, *args[1:]), self._current.arguments(kwargs)

    def _narrow(self, index: int, layer: nn.Module, args: tuple, kwargs: dict) -> Tensor:
        """Asks the selection which rows stay."""
        self.watch.stop("recompute_s")
        rows, exists = self._current.rows.rows, self._current.exists
        column = rows.order.clamp(min=0)
        # What no cache holds cannot be dropped: nothing would take its place.
        is_cached = self.columns.group.gather(1, column) != GLOBAL
        eligible = (rows.kind == Kind.CHUNK) & is_cached
        made: list[LayerKV] = []

        def probe() -> tuple[LayerKV, LayerKV]:
            made.append(self._probe(index, layer, args, self._current.arguments(kwargs)))
            self.probes[index] = self.plans[-1]
            return made[0], LayerKV(*self.cache.held(index))

        check = LayerCheck(
            layer=index,
            num_layers=len(self.cache),
            eligible=eligible,
            context_tokens=(self.columns.kind == Kind.CHUNK).sum(1),
            cached_tokens=(self.columns.kind != Kind.PAD).sum(1) - (exists & ~eligible).sum(1),
            chunk=rows.chunk,
            question_mass=None if self.chunk_probe is None else self.chunk_probe.of_question(),
            probe=probe,
        )
        kept = self.schedule.selection.refine(check) & eligible
        if made and self.schedule.selection.keeps_keys:
            self.cache.store(index, *made[0])
            if self.reshaping is not None:
                self.reshaping.wrote(index, self._current.rows.columns)
        mask = self._current.of_candidates(kept | (exists & ~eligible))
        hidden = self._change(index, args[0], mask)
        self.watch.stop("select_s")
        return hidden

    def _probe(self, index: int, layer: nn.Module, args: tuple, kwargs: dict) -> LayerKV:
        def stop(keys: Tensor, values: Tensor) -> None:
            raise _StatesMade(LayerKV(keys, values))

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
        if layer in self.schedule.states and layer in self.schedule.widen:
            columns = self.candidates.columns.clamp(min=0)
            states = self.schedule.states[layer]
            whole = states.gather(1, as_index(columns, states)).to(hidden.dtype)
        self._current.put(hidden, whole)
        self._go_on(layer, RowSubset(self.candidates, mask))
        return self._current.pick(whole)

    def _go_on(self, layer: int, current: RowSubset) -> None:
        """Computes these rows from ``layer`` on."""
        if self.plans and not self.plans[-1].executed:
            self.plans.pop()  # all candidates, where the first layer computes fewer
        if self.plans:
            self.plans[-1].forget()
        self._current, rows = current, current.rows
        facts = rows.rows
        if self.schedule.selection.sees_future and layer >= min(self._checks, default=0):
            facts = _seeing_future(facts, self.columns)
        self.plans.append(CachePlan(facts, self.columns, self.reshaping, rows.columns))
        self.cache.select(rows.columns, range(layer, len(self.cache)))


def _seeing_future(query: Rows, columns: Rows) -> Rows:
    """The last row sees all columns, each row before it one less, wherever they stand."""
    exists = query.kind != Kind.PAD
    before_last = exists.flip(1).cumsum(1).flip(1) - 1
    order = columns.order.amax(1, keepdim=True) - before_last
    return Rows(**{**vars(query), "order": torch.where(exists, order, query.order)})
