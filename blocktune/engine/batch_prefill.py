"""One batch of requests on its way from prompts to the first logits."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch

from blocktune.cache import Damaged, RowCache, Stream
from blocktune.engine.assemble import Assembled, from_chunks, from_prefix
from blocktune.engine.cacheblend_pipeline import LoadingChoice
from blocktune.engine.cost import Executed
from blocktune.engine.generation import Generation
from blocktune.engine.layer_schedule import LayerSchedule
from blocktune.engine.prefill import Prefill, prefill
from blocktune.engine.rows import Computed, column_rows, computed_rows
from blocktune.engine.scoring_passes import ScoringPasses
from blocktune.engine.state import EngineState
from blocktune.engine.usage import Stopwatch
from blocktune.layout import Kind
from blocktune.methods import Cached, Method
from blocktune.methods.reshape import Reshaping
from blocktune.prompt import Pieces, Prompt, stack


@torch.no_grad()
def prefill_batch(
    state: EngineState, prompts: Sequence[Prompt], pieces: Sequence[Pieces], method: Method
) -> Generation:
    """Assembles what is cached, computes the rest, and stops before the first token."""
    if method.paced:
        try:
            with Stream(state.encoder.store) as stream:
                return BatchPrefill(state, prompts, pieces, method, stream).run()
        except Damaged:
            pass  # without a stream the chunk is rejected, reported and encoded again
    return BatchPrefill(state, prompts, pieces, method).run()


class BatchPrefill:
    """What a batch's prefill is made of; `run` assembles, chooses and computes, in this order.

    Attributes:
        uses_no_cache: Whether nothing comes from chunk caches.
        is_exact: Whether the computed states are those of a full prefill, so that they may be kept
            as exact.
    """

    def __init__(
        self,
        state: EngineState,
        prompts: Sequence[Prompt],
        pieces: Sequence[Pieces],
        method: Method,
        stream: Stream | None = None,
    ):
        """Stacks the prompts over an empty cache.

        Args:
            state: The engine's model and caches.
            prompts: Laid out for the method.
            pieces: Their tokens.
            method: How they are served.
            stream: Loads chunks layer by layer while others are computed; None: all beforehand.
        """
        self.watch = Stopwatch(state.model.device)
        self.watch.start()
        self.state, self.pieces, self.method, self.stream = state, pieces, method, stream
        self.batch = stack(prompts, state.pad_id).to(state.model.device)
        self.columns = column_rows(self.batch.layout)
        reshape = method.reshape()
        self.uses_no_cache = method.cached is not Cached.CHUNKS
        self.is_exact = self.uses_no_cache and reshape is None
        self.reshaping = None if reshape is None else Reshaping(reshape, self.columns)
        shape = self.columns.kind.shape
        self.cache = RowCache(state.num_layers, *shape, spare=64, exact=self.is_exact)
        self.selection = method.selection_for(state.num_layers)
        self.watch.stop("prompt_s")

    def run(self) -> Generation:
        """Stops before the first token."""
        assembled = self._assemble()
        self.watch.start()
        choice = self._pace()
        if choice is not None:
            self.selection = self.selection.with_budget(choice.ratio)
        passes = self._passes(assembled)
        candidates, schedule = self._choose(assembled, passes)
        self.watch.stop("select_s")
        state, watch = self.state, self.watch
        made = prefill(
            state.model, candidates, self.columns, self.cache, schedule, watch, self.reshaping
        )
        watch.stop("recompute_s")
        if self.stream is not None:
            self._learn_speeds(made, choice)
        return Generation(
            state=state,
            batch=self.batch,
            columns=self.columns,
            last=candidates.rows.map(lambda field: field[:, -1:]),
            cache=self.cache,
            assembled=assembled,
            prefill=made,
            executed=[*passes.executed, made.executed(state.model), *self._surveys()],
            watch=watch,
            reshaping=self.reshaping,
            keep=tuple(self.pieces) if self._keeps_prefixes else (),
            lessons=tuple(self.pieces),
            recall=self.method.recall,
            choice=choice,
        )

    @property
    def _keeps_prefixes(self) -> bool:
        return self.is_exact and self.method.cached is Cached.EXACT_PREFIX

    def _assemble(self) -> Assembled:
        state, batch, pieces, cache = self.state, self.batch, self.pieces, self.cache
        if self.method.cached is Cached.CHUNKS:
            widens = self.selection.widens(state.num_layers)
            encoder, rope, watch = state.encoder, state.rope, self.watch
            return from_chunks(batch, pieces, cache, encoder, rope, watch, widens, self.stream)
        if self.method.cached is Cached.EXACT_PREFIX:
            tree, fingerprint = state.prefix_tree, state.encoder.fingerprint
            return from_prefix(batch, pieces, cache, tree, fingerprint, self.watch)
        return Assembled.empty(batch)

    def _pace(self) -> LoadingChoice | None:
        """How much to recompute while chunks load; None where that is fixed."""
        floor = getattr(self.selection, "ratio", None)
        if not self.method.paced or floor is None or self.method.layer_budget is not None:
            return None
        tokens = int(self.batch.layout.is_context.sum())
        num_bytes = self.stream.num_bytes if self.stream else 0
        return self.state.controller.choose(floor, tokens, self.state.num_layers, num_bytes)

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
            variants=state.encoder.variants,
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
        start = ~assembled.cached & ~layout.is_pad & (layout.kind != Kind.GHOST)
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
            watches_chunks=selection.watches_chunks or self.method.recall is not None,
        )
        return candidates, schedule

    def _surveys(self) -> list[Executed]:
        """What reshaping cost in the prefill; decoding will add its own to the same tensor."""
        if self.reshaping is None:
            return []
        return [Executed(self.state.model, heads=0, extra=self.reshaping.multiply_adds.clone())]

    def _learn_speeds(self, made: Prefill, choice: LoadingChoice | None) -> None:
        """Books the time spent on waiting, tells the controller, keeps what it wants in memory."""
        stream, watch, controller = self.stream, self.watch, self.state.controller
        watch.add("recompute_s", -stream.waited_s)
        watch.add("load_s", stream.waited_s)
        rows = sum(int((p.query.kind != Kind.PAD).sum()) * len(p.executed) for p in made.plans)
        controller.saw_computing(rows, watch.seconds["recompute_s"])
        controller.saw_reading(stream.num_bytes, stream.read_s)
        if choice is None or choice.tier == "memory":
            stream.keep()
