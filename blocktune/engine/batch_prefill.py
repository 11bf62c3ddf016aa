"""One batch of requests on its way from prompts to the first logits."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import TYPE_CHECKING

import torch

from blocktune.cache import RowCache, Stream
from blocktune.engine.assemble import Assembled, from_chunks, from_prefix
from blocktune.engine.cacheblend_pipeline import LoadingChoice
from blocktune.engine.cost import Executed
from blocktune.engine.generation import Run
from blocktune.engine.layer_schedule import Course
from blocktune.engine.prefill import Prefill, prefill
from blocktune.engine.rows import Computed, column_rows, computed_rows
from blocktune.engine.scoring_passes import ServedPasses
from blocktune.engine.usage import Stopwatch
from blocktune.layout import Kind
from blocktune.methods import Cached, Method
from blocktune.methods.reshaped_attention import ReshapedAttention
from blocktune.prompt import Pieces, Prompt, stack

if TYPE_CHECKING:
    from blocktune.engine.state import Server


class Opening:
    """What a batch's prefill is made of; `run` assembles, chooses and computes, in this order.

    Attributes:
        exact: Whether nothing comes from chunk caches.
        true: Whether what is computed is what a full prefill would make: it may be kept as such.
    """

    def __init__(
        self,
        server: Server,
        prompts: Sequence[Prompt],
        pieces: Sequence[Pieces],
        method: Method,
        stream: Stream | None = None,
    ):
        """Stacks the prompts over an empty cache.

        Args:
            server: Its model and caches.
            prompts: Laid out for the method.
            pieces: Their tokens.
            method: How they are served.
            stream: Loads chunks layer by layer while others are computed; None: all beforehand.
        """
        self.watch = Stopwatch(server.model.device)
        self.watch.start()
        self.server, self.pieces, self.method, self.stream = server, pieces, method, stream
        self.batch = stack(prompts, server.pad_id).to(server.model.device)
        self.columns = column_rows(self.batch.layout)
        reshape = method.reshape()
        self.exact = method.cached is not Cached.CHUNKS
        self.true = self.exact and reshape is None
        self.reshaping = None if reshape is None else ReshapedAttention(reshape, self.columns)
        shape = self.columns.kind.shape
        self.cache = RowCache(server.num_layers, *shape, spare=64, exact=self.true)
        self.selection = method.select_for(server.num_layers)
        self.watch.stop("prompt_s")

    def run(self) -> Run:
        """Stops before the first token."""
        assembled = self._assemble()
        self.watch.start()
        choice = self._pace()
        if choice is not None:
            self.selection = self.selection.with_budget(choice.ratio)
        passes = self._passes(assembled)
        universe, course = self._choose(assembled, passes)
        self.watch.stop("select_s")
        server, watch = self.server, self.watch
        made = prefill(
            server.model, universe, self.columns, self.cache, course, watch, self.reshaping
        )
        watch.stop("recompute_s")
        if self.stream is not None:
            self._learn_speeds(made, choice)
        return Run(
            server=server,
            batch=self.batch,
            columns=self.columns,
            last=universe.rows.map(lambda field: field[:, -1:]),
            cache=self.cache,
            assembled=assembled,
            prefill=made,
            executed=[*passes.executed, made.executed(server.model), *self._surveys()],
            watch=watch,
            reshaping=self.reshaping,
            keep=tuple(self.pieces) if self._keeps_prefixes else (),
            lessons=tuple(self.pieces),
            recall=self.method.recall,
            choice=choice,
        )

    @property
    def _keeps_prefixes(self) -> bool:
        return self.true and self.method.cached is Cached.EXACT_PREFIX

    def _assemble(self) -> Assembled:
        server, batch, pieces, cache = self.server, self.batch, self.pieces, self.cache
        if self.method.cached is Cached.CHUNKS:
            widens = self.selection.widens(server.num_layers)
            encoder, rope, watch = server.encoder, server.rope, self.watch
            return from_chunks(batch, pieces, cache, encoder, rope, watch, widens, self.stream)
        if self.method.cached is Cached.EXACT_PREFIX:
            tree, fingerprint = server.prefix_tree, server.encoder.fingerprint
            return from_prefix(batch, pieces, cache, tree, fingerprint, self.watch)
        return Assembled.empty(batch)

    def _pace(self) -> LoadingChoice | None:
        """How much to recompute while chunks load; None where that is fixed."""
        floor = getattr(self.selection, "ratio", None)
        if not self.method.paced or floor is None or self.method.layer_budget is not None:
            return None
        tokens = int(self.batch.layout.is_context.sum())
        num_bytes = self.stream.num_bytes if self.stream else 0
        return self.server.controller.choose(floor, tokens, self.server.num_layers, num_bytes)

    def _passes(self, assembled: Assembled) -> ServedPasses:
        """What a selector may ask for; a reshape that looks ahead has looked then."""
        server = self.server
        passes = ServedPasses(
            model=server.model,
            auxiliaries=server.auxiliaries,
            batch=self.batch,
            pieces=self.pieces,
            columns=self.columns,
            cache=self.cache,
            cached=assembled.cached,
            variants=server.encoder.variants,
        )
        if self.reshaping is not None and self.reshaping.reshape.looks_ahead:
            passes.look_ahead(self.reshaping)
        return passes

    def _choose(self, assembled: Assembled, passes: ServedPasses) -> tuple[Computed, Course]:
        """All rows that some layer computes, and which of them each does."""
        layout, selection = self.batch.layout, self.selection
        # What no cache holds is computed anyway, and a chunk's token when it is selected (its
        # original is overwritten then).
        start = ~assembled.cached & ~layout.is_pad & (layout.kind != Kind.BLANK)
        if not self.exact:
            start = start | selection.begin(layout, passes)
        layers = selection.widens(self.server.num_layers)
        widened = {layer: selection.widen(layer, layout) for layer in layers}
        universe = computed_rows(self.batch, reduce(torch.logical_or, widened.values(), start))
        course = Course(
            start=universe.of(start),
            widen={layer: universe.of(mask) for layer, mask in widened.items()},
            states=assembled.states,
            selection=selection,
            watches_chunks=selection.watches_chunks or self.method.recall is not None,
        )
        return universe, course

    def _surveys(self) -> list[Executed]:
        """What reshaping cost in the prefill; decoding will add its own to the same tensor."""
        if self.reshaping is None:
            return []
        return [Executed(self.server.model, heads=0, extra=self.reshaping.multiply_adds.clone())]

    def _learn_speeds(self, made: Prefill, choice: LoadingChoice | None) -> None:
        """Books the time spent on waiting, tells the controller, keeps what it wants in memory."""
        stream, watch, controller = self.stream, self.watch, self.server.controller
        watch.add("recompute_s", -stream.waited_s)
        watch.add("load_s", stream.waited_s)
        rows = sum(int((p.query.kind != Kind.PAD).sum()) * len(p.executed) for p in made.plans)
        controller.saw_computing(rows, watch.seconds["recompute_s"])
        controller.saw_reading(stream.num_bytes, stream.read_s)
        if choice is None or choice.tier == "memory":
            stream.keep()
