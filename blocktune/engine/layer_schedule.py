"""Runs a prefill in which each layer computes its own set of rows, on a stock model."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from blocktune.attention import attach, planned_forward
from blocktune.attention.cached import CachePlan
from blocktune.cache import RowCache
from blocktune.engine.attention_probes import ChunkAttention, ProbeDone
from blocktune.engine.rows import Computed, RowSubset, as_index
from blocktune.engine.state import ServedBatch
from blocktune.layout import GLOBAL, Kind, Rows
from blocktune.methods.repaired_cache import RepairedCache
from blocktune.methods.select import SELECTORS, LayerCheck, LayerKV, Selection
from blocktune.methods.select.layers import compared
from blocktune.models.gate import decoder_layers, require_supported
from blocktune.models.probe import NoRotary
from blocktune.models.recurrent import Recurrence, find_recurrence
from blocktune.positions import RopeSpec
from blocktune.registry import require_like


@dataclass(frozen=True)
class LayerSchedule:
    """Which of the ``U`` candidate rows each layer computes."""

    selection: Selection  # consulted at its check layers
    start: Tensor  # (B, U) bool: candidates that the first layer computes
    widen: Mapping[int, Tensor]  # by layer, (B, U) bool: rows added at its input
    states: Mapping[int, Tensor]  # by layer, (B, N, hidden): cached hidden states at its input
    depth: Tensor | None = None  # (B, U): how many layers, from the first, compute each; None: all
    hidden: Tensor | None = None  # (B, N) bool: columns that recomputed chunk tokens do not see


class SchedulePlan:
    """Attention plan of one forward pass whose rows change between layers. See `Prefill`."""

    def __init__(self, served: ServedBatch, candidates: Computed, schedule: LayerSchedule):
        self.candidates, self.schedule, self.watch = candidates, schedule, served.watch
        self.columns, self.cache, self.reshaping = served.columns, served.cache, served.reshaping
        self.rope, repair, selection = served.state.rope, served.method.repair(), schedule.selection
        self.repair = repair and RepairedCache(repair, self.columns, self.cache)
        self.plans: list[CachePlan] = []
        self.probes: dict[int, CachePlan] = {}
        self._checks = frozenset(selection.checks(len(self.cache)))
        self._ends = frozenset(() if schedule.depth is None else schedule.depth.unique().tolist())
        history = served.method.history
        watches = selection.watches_chunks or (history is not None and history.watches_chunks)
        self.chunk_probe = ChunkAttention(self.columns) if watches else None
        self._set_rows(0, RowSubset(candidates, candidates.rows.kind != Kind.PAD))

    def attend(self, query, key, value, rule, params) -> Tensor:
        """Implements `Plan.attend` by the plan of the layer's rows."""
        if self.chunk_probe is not None:
            self.chunk_probe.read(self.plans[-1].query, query, key, rule, params)
        return self.plans[-1].attend(query, key, value, rule, params)

    def enter(self, index: int, layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Forward pre-hook of layer ``index`` that replaces its inputs by those of its rows."""
        hidden = args[0]
        if index == 0 and not torch.equal(self.schedule.start, self._current.chosen):
            hidden = self._change(index, hidden, self.schedule.start)
        if index and index in self._ends:
            continued = self._current.chosen & (self.schedule.depth > index)
            hidden = self._change(index, hidden, continued)
        if index in self._checks:
            hidden = self._narrow(index, layer, (hidden, *args[1:]), kwargs)
        if index in self.schedule.widen:
            hidden = self._change(index, hidden, self._current.chosen | self.schedule.widen[index])
        current = self._current
        if self.repair is not None:
            self.repair.watch(index, current.rows.columns)
        return (hidden, *current.positional(args[1:])), current.arguments(kwargs)

    def _narrow(self, index: int, layer: nn.Module, args: tuple, kwargs: dict) -> Tensor:
        self.watch.stop("recompute_s")
        rows, exists = self._current.rows.rows, self._current.exists
        column = rows.order.clamp(min=0)
        # Only cached rows can be dropped: the others have no states to fall back on.
        is_cached = self.columns.group.gather(1, column) != GLOBAL
        eligible = (rows.kind == Kind.CHUNK) & is_cached
        fresh: list[LayerKV] = []

        def stop(*states: Tensor) -> None:
            fresh.append(LayerKV(*states))
            raise ProbeDone

        def probe() -> tuple[LayerKV, LayerKV]:
            current, cache = self._current, self.cache.layers[index]
            cache.observer = stop  # the layer ends once its keys and values are computed
            with suppress(ProbeDone):
                layer.forward(args[0], *current.positional(args[1:]), **current.arguments(kwargs))
            cache.observer = None
            self.probes[index] = self.plans[-1]
            cached = LayerKV(*cache.held())
            if self.repair is not None:
                self.repair.compared(current.rows.columns, fresh[0], cached)
            rope = self.rope.layers[index]
            return compared(fresh[0], rope), compared(cached, rope)

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
        selection = self.schedule.selection
        selected = selection.refine(check)
        require_like(f"selector '{SELECTORS.name_of(selection)}'", selected, eligible)
        selected = selected & eligible
        if fresh and selection.keeps_keys:
            columns = self._current.rows.columns
            if self.repair is not None:
                self.repair.keep(index, columns, fresh[0])
            self.cache.layers[index].store(*fresh[0])
            if self.reshaping is not None:
                self.reshaping.wrote(index, columns)
        mask = self._current.of_candidates(selected | (exists & ~eligible))
        hidden = self._change(index, args[0], mask)
        self.watch.stop("select_s")
        return hidden

    def _change(self, layer: int, hidden: Tensor, mask: Tensor) -> Tensor:
        """Replaces the current rows by those of ``mask`` ``(B, U)``. Returns their states."""
        all_hidden = hidden.new_zeros(*mask.shape, hidden.shape[-1])
        if layer in self.schedule.states and layer in self.schedule.widen:
            columns = self.candidates.columns.clamp(min=0)
            states = self.schedule.states[layer]
            all_hidden = states.gather(1, as_index(columns, states)).to(hidden.dtype)
        self._current.put(hidden, all_hidden)
        self._set_rows(layer, RowSubset(self.candidates, mask))
        return self._current.pick(all_hidden)

    def _set_rows(self, layer: int, current: RowSubset) -> None:
        if self.plans and not self.plans[-1].executed:
            self.plans.pop()  # no layer used it: e.g. the first layer computes fewer rows
        if self.plans:
            self.plans[-1].forget()
        self._current, rows = current, current.rows
        facts, columns = rows.rows, self.columns
        if self.schedule.hidden is not None:
            facts, columns = _seeing_chosen(facts, columns, self.schedule.hidden)
        if self.schedule.selection.sees_future and layer >= min(self._checks, default=0):
            facts = _seeing_future(facts, self.columns)
        self.plans.append(CachePlan(facts, columns, self.reshaping, rows.columns))
        self.cache.select(rows.columns, range(layer, len(self.cache)))


def _seeing_future(query: Rows, columns: Rows) -> Rows:
    """Lets the last row see all columns and each earlier row one less, whatever their order."""
    exists = query.kind != Kind.PAD
    before_last = exists.flip(1).cumsum(1).flip(1) - 1
    order = columns.order.amax(1, keepdim=True) - before_last
    return replace(query, order=torch.where(exists, order, query.order))


def _seeing_chosen(query: Rows, columns: Rows, hidden: Tensor) -> tuple[Rows, Rows]:
    """Groups chunk rows with all columns that are not hidden. Other rows still see everything."""
    group = columns.group.max() + 1
    query_group = query.group.masked_fill(query.kind == Kind.CHUNK, group)
    key_group = torch.where(hidden, columns.group, group)
    return replace(query, group=query_group), replace(columns, group=key_group)


@dataclass
class Prefill:
    """The result of a prefill, and what was computed for it."""

    logits: Tensor  # after each prompt's last row, ``(B, V)``
    # the attention plans that ran, each with the layers it ran in
    plans: list[CachePlan] = field(default_factory=list)
    # by layer: rows whose states were computed for selection only
    probes: dict[int, CachePlan] = field(default_factory=dict)
    chunk_probe: ChunkAttention | None = None  # attention to chunks, if it is read

    def layer_tokens(self, num_layers: int) -> Tensor:
        """Number of context tokens computed in each layer, ``(B, layers)``."""
        counts = torch.zeros(len(self.logits), num_layers, dtype=torch.int64)
        for plan in self.plans:
            for layer in plan.executed:
                counts[:, layer] += plan.context_rows.cpu()
        return counts

    def probed(self) -> Tensor:
        """Context tokens whose states were computed for selection only, over layers, ``(B,)``."""
        none = torch.zeros(len(self.logits), dtype=torch.int64)
        return sum((plan.context_rows.cpu() for plan in self.probes.values()), none)

    def bytes_written(self, cache: RowCache) -> Tensor:
        """Bytes of computed keys and values that were written to the cache, ``(B,)``."""
        total = torch.zeros(len(self.logits), dtype=torch.int64)
        for plan in self.plans:
            total += plan.num_rows() * sum(map(cache.bytes_per_column, plan.executed))
        return total


@torch.no_grad()
def prefill(served: ServedBatch, candidates: Computed, schedule: LayerSchedule) -> Prefill:
    """Computes rows into the batch's cache, layer by layer, and the logits after the last row.

    The cache must hold the states of all columns that are not among the ``candidates``. The watch
    gets ``select_s`` for each selection, and ``recompute_s`` for the computation before it.
    """
    plan = SchedulePlan(served, candidates, schedule)
    model, positions = served.state.model, candidates.rows.position
    output = planned_forward(model, candidates.ids, positions, plan, served.cache, logits_to_keep=1)
    for layer in range(len(served.cache)) if plan.repair is not None else ():
        served.cache.layers[layer].observer = None  # decoded tokens repair nothing
    return Prefill(output.logits[:, -1], plan.plans, plan.probes, plan.chunk_probe)


@dataclass(frozen=True)
class Enter:
    """Forward pre-hook that passes a layer's input to the plan's ``enter``, if it has one.

    Equal hooks are registered once.
    """

    index: int

    @torch.compiler.disable  # traced, the rows of each batch would be compiled
    def __call__(self, layer: nn.Module, args: tuple, kwargs: dict) -> Any:
        """Called by torch before the layer's forward pass."""
        enter = getattr(kwargs.get("plan"), "enter", None)
        return None if enter is None else enter(self.index, layer, args, kwargs)


def hook(model: PreTrainedModel) -> tuple[RopeSpec | None, Recurrence | None]:
    """Attaches blocktune to a model. Returns how its keys rotate, or how it resumes from a cache.

    The latter is for models with recurrent layers or absolute positions, which are not changed.
    Raises ValueError if the model is of neither kind, or cannot generate text.
    """
    if not getattr(model, "can_generate", bool)() or hasattr(model, "_orig_mod"):
        raise ValueError(
            f"an engine needs a causal language model, got {type(model).__name__}; load it by "
            "AutoModelForCausalLM or Engine.from_pretrained, and compile it in place by compile()"
        )
    if len(devices := sorted({str(weight.device) for weight in model.parameters()})) > 1:
        raise ValueError(
            f"an engine needs all weights on one device, got {', '.join(devices)}; load the model "
            "without device_map='auto' (quantized, if it is too large), or use `blocktune vllm`"
        )
    if (recurrence := find_recurrence(model)) is not None:
        return None, recurrence
    try:
        rope = require_supported(model)
    except NoRotary:
        return None, find_recurrence(model, always=True)
    attach(model)
    for index, layer in enumerate(decoder_layers(model)):
        if Enter(index) not in layer._forward_pre_hooks.values():
            layer.register_forward_pre_hook(Enter(index), with_kwargs=True)
    return rope, None
