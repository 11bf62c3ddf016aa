"""One batch of requests on its way from prompts to the first logits."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial, reduce

import torch

from blocktune.cache import RowCache, cut_exact
from blocktune.engine.assemble import Assembled, from_chunks, from_prefix
from blocktune.engine.attention_probes import ScoringPasses
from blocktune.engine.cache_repair import CacheRepair
from blocktune.engine.generation import Generation
from blocktune.engine.layer_schedule import LayerSchedule, Prefill, prefill
from blocktune.engine.recurrent import prefill_recurrent
from blocktune.engine.rows import Computed, column_rows, computed_rows
from blocktune.engine.state import EngineState
from blocktune.engine.usage import Executed, Stopwatch
from blocktune.layout import Kind
from blocktune.methods import Cached, Method
from blocktune.methods.hooks import ChunkLoader, DamagedChunk, PrefilledBatch
from blocktune.methods.reshaped_attention import ReshapedAttention
from blocktune.prompt import Pieces, Prompt, stack


@torch.no_grad()
def prefill_batch(
    state: EngineState, prompts: Sequence[Prompt], pieces: Sequence[Pieces], method: Method
) -> Generation:
    """Assembles what is cached, computes the rest, and stops before the first token."""
    if state.recurrence is not None:
        return prefill_recurrent(state, prompts, pieces, method)
    loader = method.loader(state.encoder.store, state.encoder.fingerprint)
    try:
        with loader or nullcontext():
            return BatchPrefill(state, prompts, pieces, method, loader).run()
    except DamagedChunk:  # read as a whole, the store rejects the chunk, and it is encoded again
        return BatchPrefill(state, prompts, pieces, method, lazy=False).run()


class BatchPrefill:
    """A batch's prefill: `run` assembles, chooses and computes, in this order."""

    def __init__(
        self,
        state: EngineState,
        prompts: Sequence[Prompt],
        pieces: Sequence[Pieces],
        method: Method,
        loader: ChunkLoader | None = None,
        lazy: bool = True,
    ):
        """Stacks prompts, laid out for the method, over an empty cache.

        Without a ``loader`` all chunks are loaded before anything is computed; ``lazy``: into
        their place at once, where no memory is to hold them.
        """
        self.watch = Stopwatch(state.model.device)
        self.watch.start()
        self.state, self.pieces, self.method, self.loader = state, pieces, method, loader
        self.lazy = lazy
        self.batch = stack(prompts, state.pad_id).to(state.model.device)
        self.columns = column_rows(self.batch.layout)
        reshape = method.reshape()
        self.uses_no_cache = method.cached is not Cached.CHUNKS
        # The states are those of a full prefill, so that they may be kept as exact prefixes.
        self.is_exact = self.uses_no_cache and reshape is None
        self.reshaping = None if reshape is None else ReshapedAttention(reshape, self.columns)
        shape = self.columns.kind.shape
        self.cache = RowCache(state.num_layers, *shape, spare=64, exact=self.is_exact)
        self.selection = method.select_for(state.num_layers)
        self.watch.stop("prompt_s")

    def run(self) -> Generation:
        """Stops before the first token."""
        self.assembled = assembled = self._assemble()
        self.watch.start()
        if self.loader is not None and self.method.layer_budget is None:
            tokens = int(self.batch.layout.is_context.sum())
            self.selection = self.loader.choose(self.selection, tokens, self.state.num_layers)
        passes = self._passes(assembled)
        candidates, schedule = self._choose(assembled, passes)
        self.watch.stop("select_s")
        state, watch = self.state, self.watch
        repair = self.method.repair()
        made = prefill(
            *(state.model, candidates, self.columns, self.cache, schedule, watch, self.reshaping),
            None if repair is None else CacheRepair(repair, self.columns, self.cache),
        )
        watch.stop("recompute_s")
        if self.loader is not None:  # waiting counts as loading
            watch.add("recompute_s", -self.loader.waited_s)
            watch.add("load_s", self.loader.waited_s)
            rows = sum(int(plan.num_rows().sum()) * len(plan.executed) for plan in made.plans)
            self.loader.done(rows, watch.seconds["recompute_s"])
        surveys = []
        if self.reshaping is not None:  # decoding will add its own to the same tensor
            extra = self.reshaping.multiply_adds.clone()
            surveys = [Executed(state.model, heads=0, extra=extra)]
        return Generation(
            state=state,
            batch=self.batch,
            columns=self.columns,
            last=candidates.rows.map(lambda field: field[:, -1:]),
            cache=self.cache,
            assembled=assembled,
            prefill=made,
            executed=[*passes.executed, made.executed(state.model), *surveys],
            watch=watch,
            reshaping=self.reshaping,
            remember=partial(self._remember, made),
            loading=None if self.loader is None else self.loader.report,
        )

    def _remember(self, made: Prefill) -> None:
        """Keeps what later prompts can use: exact prefixes, and what the method's history wants."""
        if self.is_exact and self.method.cached is Cached.EXACT_PREFIX:
            for index, prompt in enumerate(self.pieces):
                ids, start = prompt.context, self.assembled.prefix_tokens[index]
                fingerprint = self.state.encoder.fingerprint
                if start < len(ids):
                    kept = cut_exact(self.cache, index, ids, fingerprint, start=start)
                    self.state.prefix_tree.insert(kept)
        if self.method.history is not None:
            # Mean over heads and layers, ``(B, N, C)``.
            attention = made.chunk_probe.mass / made.chunk_probe.layers
            batch = PrefilledBatch(self.pieces, self.columns, self.cache, attention)
            encoder = self.state.encoder
            self.method.history.update(encoder.store, encoder.fingerprint, batch)

    def _assemble(self) -> Assembled:
        state, batch, pieces, cache = self.state, self.batch, self.pieces, self.cache
        if self.method.cached is Cached.CHUNKS:
            widens = self.selection.widens(state.num_layers)
            encoder, rope, watch = state.encoder, state.rope, self.watch
            how = (widens, self.loader, self.lazy)
            return from_chunks(batch, pieces, cache, encoder, rope, watch, *how)
        if self.method.cached is Cached.EXACT_PREFIX:
            tree, fingerprint = state.prefix_tree, state.encoder.fingerprint
            return from_prefix(batch, pieces, cache, tree, fingerprint, self.watch)
        return Assembled.empty(batch)

    def _passes(self, assembled: Assembled) -> ScoringPasses:
        """What a selector may ask for; a reshape that looks ahead has looked then."""
        state = self.state
        passes = ScoringPasses(
            model=state.model,
            auxiliaries=state.auxiliaries,
            batch=self.batch,
            pieces=self.pieces,
            columns=self.columns,
            cache=self.cache,
            cached=assembled.cached,
            rope=state.rope,
            store=state.encoder.store,
            fingerprint=state.encoder.fingerprint,
        )
        if self.reshaping is not None and self.reshaping.reshape.looks_ahead:
            passes.look_ahead(self.reshaping)
        return passes

    def _choose(
        self, assembled: Assembled, passes: ScoringPasses
    ) -> tuple[Computed, LayerSchedule]:
        """All rows that some layer computes, and which of them each does."""
        layout, selection = self.batch.layout, self.selection
        # What no cache holds is computed anyway, and a chunk's token when it is selected (its
        # original is overwritten then).
        start = ~assembled.cached & ~layout.is_pad & (layout.kind != Kind.BLANK)
        if not self.uses_no_cache:
            start = start | selection.begin(layout, passes)
        layers = selection.widens(self.state.num_layers)
        widened = {layer: selection.widen(layer, layout) for layer in layers}
        candidates = computed_rows(self.batch, reduce(torch.logical_or, widened.values(), start))
        schedule = LayerSchedule(
            start=candidates.of(start),
            widen={layer: candidates.of(mask) for layer, mask in widened.items()},
            states=assembled.states,
            selection=selection,
            watches_chunks=selection.watches_chunks or self.method.history is not None,
        )
        return candidates, schedule
