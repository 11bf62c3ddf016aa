"""One batch of requests, from prompts to the first logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blocktune.cache import Damaged, PrefixTree, RowCache, Stream, cut_exact
from blocktune.engine.account import Stopwatch
from blocktune.engine.assemble import Assembled, from_chunks, from_prefix
from blocktune.engine.auxiliary import Auxiliaries
from blocktune.engine.cost import Executed
from blocktune.engine.encode import Encoder
from blocktune.engine.loading import LoadingChoice, LoadingController
from blocktune.engine.passes import ServedPasses
from blocktune.engine.prefill import Prefill, prefill
from blocktune.engine.rows import column_rows, computed_rows
from blocktune.engine.run import Run
from blocktune.engine.schedule import Course
from blocktune.layout import Kind, Layout
from blocktune.positions import RopeSpec
from blocktune.prompt import Pieces, Prompt, end_of_turn, stack
from blocktune.reshape import Reshaping
from blocktune.reuse import Cached, Method


@dataclass(frozen=True)
class Server:
    """What all batches of an engine share: the model and its caches."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    encoder: Encoder
    prefix_tree: PrefixTree
    rope: RopeSpec
    pad_id: int
    auxiliaries: Auxiliaries
    controller: LoadingController = field(default_factory=LoadingController)

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return self.model.config.get_text_config().num_hidden_layers

    def start(self, prompts: Sequence[Prompt], pieces: Sequence[Pieces], method: Method) -> Run:
        """Assembles what is cached, computes the rest, and stops before the first token."""
        if method.paced:
            try:
                with Stream(self.encoder.store) as stream:
                    return self._start(prompts, pieces, method, stream)
            except Damaged:
                pass  # without a stream the chunk is rejected, reported and encoded again
        return self._start(prompts, pieces, method)

    @torch.no_grad()
    def _start(
        self,
        prompts: Sequence[Prompt],
        pieces: Sequence[Pieces],
        method: Method,
        stream: Stream | None = None,
    ) -> Run:
        watch = Stopwatch(self.model.device)
        watch.start()
        batch = stack(prompts, self.pad_id).to(self.model.device)
        layout, columns = batch.layout, column_rows(batch.layout)
        exact = method.cached is not Cached.CHUNKS
        reshape = method.reshape()
        reshaping = None if reshape is None else Reshaping(reshape, columns)
        true = exact and reshape is None
        cache = RowCache(self.num_layers, *columns.kind.shape, spare=64, exact=true)
        watch.stop("prompt_s")
        selection = method.selection_for(self.num_layers)
        widens = selection.widens(self.num_layers)
        assembled = self._assemble(method, batch, pieces, cache, watch, widens, stream)
        watch.start()
        choice = self._pace(method, selection, layout, stream)
        if choice is not None:
            selection = selection.with_budget(choice.ratio)
        passes = ServedPasses(
            self.model,
            self.auxiliaries,
            batch,
            pieces,
            columns,
            cache,
            assembled.cached,
            self.encoder.variants,
        )
        if reshape is not None and reshape.looks_ahead:
            passes.look_ahead(reshaping)
        # What no cache holds is computed anyway, and a chunk's token when it is selected (its
        # original is overwritten then).
        start = ~assembled.cached & ~layout.is_pad & (layout.kind != Kind.GHOST)
        if not exact:
            start = (start & ~layout.is_context) | selection.begin(layout, passes)
        widened = {layer: selection.widen(layer, layout) for layer in widens}
        universe = computed_rows(batch, reduce(torch.logical_or, widened.values(), start))
        course = Course(
            start=universe.of(start),
            widen={layer: universe.of(mask) for layer, mask in widened.items()},
            states=assembled.states,
            selection=selection,
        )
        watch.stop("select_s")
        result = prefill(self.model, universe, columns, cache, course, watch, reshaping)
        watch.stop("recompute_s")
        if stream is not None:
            self._learn_speeds(stream, result, choice, watch)
        last = universe.rows.map(lambda field: field[:, -1:])
        keep = tuple(pieces) if true and method.cached is Cached.EXACT_PREFIX else ()
        lessons = tuple(pieces) if method.recalls else ()
        executed = [*passes.executed, result.executed(self.model)]
        if reshaping is not None:
            surveys = reshaping.multiply_adds.clone()  # decoding will add its own
            executed.append(Executed(self.model, heads=0, extra=surveys))
        return Run(
            self,
            batch,
            columns,
            last,
            cache,
            assembled,
            result,
            executed,
            watch,
            reshaping,
            keep,
            lessons,
            choice,
        )

    def _pace(self, method: Method, selection, layout: Layout, stream) -> LoadingChoice | None:
        """How much to recompute while chunks load; None where that is fixed."""
        floor = getattr(selection, "ratio", None)
        if not method.paced or floor is None or method.layer_budget is not None:
            return None
        tokens, num_bytes = int(layout.is_context.sum()), stream.num_bytes if stream else 0
        return self.controller.choose(floor, tokens, self.num_layers, num_bytes)

    def _learn_speeds(self, stream: Stream, result: Prefill, choice, watch: Stopwatch) -> None:
        """Books the time spent on waiting, tells the controller, keeps what it wants in memory."""
        watch.add("recompute_s", -stream.waited_s)
        watch.add("load_s", stream.waited_s)
        rows = sum(int((p.query.kind != Kind.PAD).sum()) * len(p.executed) for p in result.plans)
        self.controller.saw_computing(rows, watch.seconds["recompute_s"])
        self.controller.saw_reading(stream.num_bytes, stream.read_s)
        if choice is None or choice.tier == "memory":
            stream.keep()

    def _assemble(self, method: Method, batch, pieces, cache, watch, layers, stream) -> Assembled:
        if method.cached is Cached.CHUNKS:
            return from_chunks(batch, pieces, cache, self.encoder, self.rope, watch, layers, stream)
        if method.cached is Cached.EXACT_PREFIX:
            fingerprint = self.encoder.fingerprint
            return from_prefix(batch, pieces, cache, self.prefix_tree, fingerprint, watch)
        return Assembled.empty(batch)

    def remember(self, cache: RowCache, pieces: Sequence[Pieces]) -> None:
        """Enters the prompts of an exact prefill into the prefix cache."""
        for index, prompt in enumerate(pieces):
            path = [prompt.prefix, *prompt.chunks]
            self.prefix_tree.insert(cut_exact(cache, index, path, self.encoder.fingerprint))

    def stop_ids(self) -> frozenset[int]:
        """Tokens that end an answer: the template's end of turn and the model's own."""
        eos = self.model.generation_config.eos_token_id
        ids = [*(eos if isinstance(eos, list) else [eos]), self.tokenizer.eos_token_id]
        return frozenset({end_of_turn(self.tokenizer)[-1], *(i for i in ids if i is not None)})

    def text(self, ids: Sequence[int]) -> str:
        """Decoded, without special tokens and the space around it."""
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()
