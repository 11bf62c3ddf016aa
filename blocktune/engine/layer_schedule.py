"""Runs a prefill in which each layer computes its own set of rows, on a stock model."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
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
from blocktune.engine.usage import Executed
from blocktune.layout import GLOBAL, Kind, Rows
from blocktune.methods.repair import REPAIRS, Repair, Residual
from blocktune.methods.select import SELECTORS, LayerCheck, LayerKV, Selection
from blocktune.methods.select.layers import compared
from blocktune.models.gate import decoder_layers, require_supported
from blocktune.models.probe import NoRotary
from blocktune.models.recurrent import Recurrence, find_recurrence
from blocktune.positions import RopeSpec
from blocktune.registry import require_like


@dataclass(eq=False)
class SchedulePlan:
    """Attention plan of a forward pass, of whose ``U`` candidate rows each layer computes some."""

    served: ServedBatch
    candidates: Computed
    selection: Selection  # consulted at its check layers
    start: Tensor  # (B, U) bool: candidates that the first layer computes
    widen: Mapping[int, Tensor]  # by layer, (B, U) bool: rows added at its input
    states: Mapping[int, Tensor]  # by layer, (B, N, hidden): cached hidden states at its input
    depth: Tensor | None = None  # (B, U): how many layers, from the first, compute each; None: all
    hidden: Tensor | None = None  # (B, N) bool: columns that recomputed chunk tokens do not see

    def __post_init__(self):
        served, kind = self.served, self.candidates.rows.kind
        self.columns, self.cache, self.reshaping = served.columns, served.cache, served.reshaping
        repair, history = served.method.repair(), served.method.history
        self.repair = repair and RepairedCache(repair, self.columns, self.cache)
        self.plans: list[CachePlan] = []  # this and the probes are as in `Executed`
        self.probes: dict[int, CachePlan] = {}
        self._checks = frozenset(self.selection.checks(len(self.cache)))
        self._ends = frozenset(() if self.depth is None else self.depth.unique().tolist())
        watches = history is not None and history.watches_chunks
        watches |= self.selection.watches_chunks
        self.chunk_probe = ChunkAttention(self.columns) if watches else None
        self._set_rows(0, RowSubset(self.candidates, kind != Kind.PAD))

    def attend(self, query, key, value, rule, params) -> Tensor:
        """Implements `Plan.attend` by the plan of the layer's rows."""
        if self.chunk_probe is not None:
            self.chunk_probe.read(self.plans[-1].query, query, key, rule, params)
        return self.plans[-1].attend(query, key, value, rule, params)

    def enter(self, index: int, layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Forward pre-hook of layer ``index`` that replaces its inputs by those of its rows."""
        hidden = args[0]
        if index == 0 and not torch.equal(self.start, self._current.chosen):
            hidden = self._change(index, hidden, self.start)
        if index and index in self._ends:
            hidden = self._change(index, hidden, self._current.chosen & (self.depth > index))
        if index in self._checks:
            hidden = self._narrow(index, layer, (hidden, *args[1:]), kwargs)
        if index in self.widen:
            hidden = self._change(index, hidden, self._current.chosen | self.widen[index])
        if self.repair is not None:
            self.repair.watch(index, self._current.rows.columns)
        args, kwargs = self._current.inputs(args[1:], kwargs)
        return (hidden, *args), kwargs

    def _narrow(self, index: int, layer: nn.Module, args: tuple, kwargs: dict) -> Tensor:
        self.served.watch.stop("recompute_s")
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
            others, options = current.inputs(args[1:], kwargs)
            with suppress(ProbeDone):
                layer.forward(args[0], *others, **options)
            cache.observer = None
            self.probes[index] = self.plans[-1]
            cached = LayerKV(*cache.held())
            if self.repair is not None:
                self.repair.compared(current.rows.columns, fresh[0], cached)
            rope = self.served.state.rope.layers[index]
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
        selected = self.selection.refine(check)
        require_like(f"selector '{SELECTORS.name_of(self.selection)}'", selected, eligible)
        selected = selected & eligible
        if fresh and self.selection.keeps_keys:
            columns = self._current.rows.columns
            if self.repair is not None:
                self.repair.keep(index, columns, fresh[0])
            self.cache.layers[index].store(*fresh[0])
            if self.reshaping is not None:
                self.reshaping.wrote(index, columns)
        mask = self._current.of_candidates(selected | (exists & ~eligible))
        hidden = self._change(index, args[0], mask)
        self.served.watch.stop("select_s")
        return hidden

    def _change(self, layer: int, hidden: Tensor, mask: Tensor) -> Tensor:
        """Replaces the current rows by those of ``mask`` ``(B, U)``. Returns their states."""
        all_hidden = hidden.new_zeros(*mask.shape, hidden.shape[-1])
        if layer in self.states:
            columns, states = self.candidates.columns.clamp(min=0), self.states[layer]
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
        if self.hidden is not None:
            facts, columns = _seeing_chosen(facts, columns, self.hidden)
        if self.selection.sees_future and layer >= min(self._checks, default=0):
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


class RepairedCache:
    """In every layer, adds the repair's offsets to reused columns before others are written."""

    def __init__(self, repair: Repair, columns: Rows, cache: RowCache):
        self.repair, self.columns, self.cache = repair, columns, cache
        # Chunks of a prompt that is computed in full are in the group `GLOBAL`: nothing is reused.
        self._is_cached = (columns.kind == Kind.CHUNK) & (columns.group != GLOBAL)
        self._deviations: tuple[Tensor, Tensor] | None = None
        self._kept = -1  # the last layer that keeps what was compared there

    def compared(self, columns: Tensor, fresh: LayerKV, cached: LayerKV) -> None:
        """Records how far the rows of ``columns`` are from the cache at the first check layer."""
        if self._deviations is None:
            pairs = zip(fresh, cached, strict=True)
            norms = [(a.float() - b.float()).square().sum((1, 3)).sqrt() for a, b in pairs]
            self._deviations = tuple(self._at_columns(norm, columns) for norm in norms)

    def keep(self, layer: int, columns: Tensor, fresh: LayerKV) -> None:
        """Repairs ``layer``, whose compared rows ``fresh`` are written next, dropped ones too."""
        self._repair(layer, columns, *fresh)
        self._kept = layer

    def watch(self, layer: int, columns: Tensor) -> None:
        """Arranges the repair of ``layer`` when it writes ``columns``, all that it computes."""
        repair = None if layer == self._kept else partial(self._repair, layer, columns)
        self.cache.layers[layer].observer = repair

    def _repair(self, layer: int, columns: Tensor, *fresh: Tensor) -> None:
        recomputed = self._at_columns(torch.ones_like(columns), columns).bool() & self._is_cached
        reused = self._is_cached & ~recomputed
        if not (recomputed.any() and reused.any()):
            return
        states = self.cache.layers[layer]
        chunk = torch.where(self._is_cached, self.columns.chunk, -1)
        deviations = self._deviations or (None, None)
        stored = states.keys, states.values
        for new, deviation, state in zip(fresh, deviations, stored, strict=True):
            change = self._at_columns(new.float().transpose(1, 2), columns).transpose(1, 2)
            change = (change - state.float()) * recomputed[:, None, :, None]
            residual = Residual(change, recomputed, reused, chunk, deviation)
            offset = self.repair.offset(residual)
            require_like(f"repair '{REPAIRS.name_of(self.repair)}'", offset, change)
            shifted = (state.float() + offset).to(state.dtype)
            state.copy_(shifted.where(reused[:, None, :, None], state))

    def _at_columns(self, values: Tensor, columns: Tensor) -> Tensor:
        """Scatters values of rows ``(B, R, ...)`` to their columns, ``(B, N, ...)``; else zero."""
        count = self.columns.kind.shape[1]
        padded = values.new_zeros(len(values), count + 1, *values.shape[2:])
        slots = columns.where(columns >= 0, count).view(*columns.shape, *[1] * (values.ndim - 2))
        return padded.scatter(1, slots.expand_as(values), values)[:, :count]


@dataclass(kw_only=True)
class Prefill(Executed):
    """The pass that computes a prompt's rows, and its result."""

    logits: Tensor  # after each prompt's last row, ``(B, V)``
    chunk_probe: ChunkAttention | None = None  # attention to chunks, if it is read

    def layer_tokens(self, num_layers: int) -> Tensor:
        """Number of context tokens computed in each layer, ``(B, layers)``."""
        counts = torch.zeros(len(self.logits), num_layers, dtype=torch.int64)
        for plan in self.plans:
            counts[:, list(plan.executed)] += plan.context_rows.cpu()[:, None]
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
def prefill(plan: SchedulePlan) -> Prefill:
    """Computes rows into the batch's cache, layer by layer, and the logits after the last row.

    The cache must hold the states of all columns that are not candidates. The watch gets
    ``select_s`` for each selection, and ``recompute_s`` for the computation before it.
    """
    (ids, rows, *_), cache, read = plan.candidates, plan.cache, plan.chunk_probe
    model, extra = plan.served.state.model, None if read is None else read.multiply_adds
    output = planned_forward(model, ids, rows.position, plan, cache, logits_to_keep=1)
    for layer in cache.layers if plan.repair is not None else ():
        layer.observer = None  # decoded tokens repair nothing
    passed = model, plan.plans, plan.probes
    return Prefill(*passed, extra=extra, logits=output.logits[:, -1], chunk_probe=read)


@dataclass(frozen=True)
class Enter:
    """Forward pre-hook that passes a layer's input to the plan's ``enter``, if it has one."""

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
            "without device_map='auto', or use `blocktune vllm`"
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
