"""Prefill of a batch of requests: from prompts to the first logits."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import reduce

import torch

from blocktune.engine.assemble import Assembled, from_chunks, from_prefix
from blocktune.engine.attention_probes import ScoringPasses
from blocktune.engine.encode import Found
from blocktune.engine.generation import Generation, Sampling
from blocktune.engine.layer_schedule import SchedulePlan, prefill
from blocktune.engine.prompts import PromptMaker
from blocktune.engine.recurrent import prefill_recurrent
from blocktune.engine.rows import computed_rows, has_column, to_columns
from blocktune.engine.state import EngineState, ServedBatch
from blocktune.engine.usage import Executed
from blocktune.layout import FOREVER
from blocktune.methods import Cached, Method, Selection
from blocktune.methods.base import ChunkLoader, DamagedChunk
from blocktune.methods.select.base import require_context, selectable
from blocktune.prompt import LayoutSpec, Pieces, Prompt


@torch.no_grad()
def prefill_batch(
    state: EngineState,
    prompts: Sequence[Prompt],
    pieces: Sequence[Pieces],
    method: Method,
    found: Found | None = None,
) -> Generation:
    """Loads the cached states of a batch (``found``: already looked up) and computes the rest."""
    batch = state, prompts, pieces, method
    if state.recurrence is not None:
        return prefill_recurrent(*batch)
    loader = method.loader(state.encoder.store, state.encoder.fingerprint)
    found = found if loader is None else None
    try:
        return _prefill(ServedBatch.stacked(*batch), loader, found)
    except DamagedChunk:  # without lazy reads, the store rejects the chunk and it is encoded again
        return _prefill(ServedBatch.stacked(*batch), None, None, lazy=False)


def prefill_warm(
    state: EngineState,
    prompts: PromptMaker,
    pieces: Sequence[Pieces],
    method: Method,
    max_new_tokens: int = 0,
    laid_out: Sequence[Prompt] | None = None,
) -> Generation:
    """Serves `Method.warm_up` prompts of other orders of the chunks, untimed, then the batch.

    Prompts are laid out after that, unless they are ``laid_out``.
    """
    for turn in range(method.warm_up):
        starts = [(p.chunks, 1 + turn % max(1, len(p.chunks) - 1)) for p in pieces]
        chunks = [chunks[start:] + chunks[:start] for chunks, start in starts]
        earlier = [p._replace(chunks=c) for p, c in zip(pieces, chunks, strict=True)]
        layouts = [prompts.prompt(prompt, LayoutSpec(block=False), 1) for prompt in earlier]
        next(prefill_batch(state, layouts, earlier, method).tokens(Sampling(), 1))
    started = time.perf_counter()
    if laid_out is None:
        laid_out = [prompts.lay_out(p, method, state.encoder, max_new_tokens) for p in pieces]
    laid_out_s = time.perf_counter() - started
    generation = prefill_batch(state, laid_out, pieces, method)
    generation.watch.add("prompt_s", laid_out_s)
    return generation


def _prefill(
    served: ServedBatch, loader: ChunkLoader | None, found: Found | None, lazy: bool = True
) -> Generation:
    state, watch = served.state, served.watch
    selection = served.method.select_for(state.num_layers)
    if served.method.cached is Cached.CHUNKS:
        assembled = from_chunks(served, loader, found, lazy)
    elif served.method.cached is Cached.EXACT_PREFIX:
        assembled = from_prefix(served)
    else:
        assembled = Assembled.empty(served.batch)
    watch.start()
    passes = ScoringPasses(served, assembled.cached)
    if served.reshaping is not None and served.reshaping.reshape.looks_ahead:
        passes.look_ahead()
    plan = _choose(served, selection, assembled, passes)
    watch.stop("select_s")
    result = prefill(plan)
    watch.stop("recompute_s")
    executed = [*passes.executed, result]
    if served.reshaping is not None:  # clone: decoding adds to the same tensor
        extra = served.reshaping.multiply_adds.clone()
        executed.append(Executed(state.model, heads=0, extra=extra))
    return Generation(
        **vars(served),
        last=plan.candidates.rows.map(lambda field: field[:, -1:]),
        assembled=assembled,
        prefill=result,
        executed=executed,
    )


def _choose(
    served: ServedBatch, selection: Selection, assembled: Assembled, passes: ScoringPasses
) -> SchedulePlan:
    layout = served.batch.layout
    # Rows that are not cached are always computed. A selected token overwrites its cached original.
    start = ~assembled.cached & has_column(layout)
    depth = hidden = None
    if served.method.cached is Cached.CHUNKS:
        selected = selection.begin(layout, passes)
        require_context(selection, selected, layout, torch.bool, torch.int64)
        if selected.dtype != torch.bool:  # number of layers, from the first, that compute each
            depth = selected.masked_fill(start, FOREVER)
        start = start | (selected > 0)
    if selection.sees == "chosen":
        hidden = to_columns(selectable(layout) & ~start, layout, served.columns)
    layers = served.state.inputs_of(served.method)
    widened = {layer: selection.widen(layer, layout) for layer in layers}
    for mask in widened.values():
        require_context(selection, mask, layout, torch.bool)
    candidates = computed_rows(served.batch, reduce(torch.logical_or, widened.values(), start))
    return SchedulePlan(
        served,
        candidates,
        selection,
        start=candidates.of(start),
        widen={layer: candidates.of(mask) for layer, mask in widened.items()},
        states=assembled.states,
        depth=None if depth is None else depth.gather(1, candidates.index),
        hidden=hidden,
    )
