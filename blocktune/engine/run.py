"""One batch of requests, from prompts to answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blocktune.cache import PrefixTree, RowCache, cut_exact
from blocktune.engine.account import Account, Stopwatch, Ttft
from blocktune.engine.assemble import Assembled, from_chunks, from_prefix
from blocktune.engine.auxiliary import Auxiliaries
from blocktune.engine.cost import Executed, ModelCost
from blocktune.engine.decode import Sampling, decode
from blocktune.engine.encode import Encoder
from blocktune.engine.passes import ServedPasses
from blocktune.engine.prefill import Prefill, prefill
from blocktune.engine.recall import learn
from blocktune.engine.rows import column_rows, computed_rows
from blocktune.engine.schedule import Course
from blocktune.layout import Kind, Rows
from blocktune.positions import RopeSpec
from blocktune.prompt import Batch, Pieces, Prompt, end_of_turn, stack
from blocktune.reshape import Reshaping
from blocktune.reuse import Cached, Method


@dataclass(frozen=True)
class Answer:
    """An answer and what it cost.

    Attributes:
        text: Decoded, without the end of turn.
        token_ids: As generated, the end of turn included.
        account: The cost.
    """

    text: str
    token_ids: tuple[int, ...]
    account: Account


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

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return self.model.config.get_text_config().num_hidden_layers

    @torch.no_grad()
    def start(self, prompts: Sequence[Prompt], pieces: Sequence[Pieces], method: Method) -> Run:
        """Assembles what is cached, computes the rest, and stops before the first token."""
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
        selection = method.selection()
        widens = selection.widens(self.num_layers)
        assembled = self._assemble(method, batch, pieces, cache, watch, widens)
        watch.start()
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
        last = universe.rows.map(lambda field: field[:, -1:])
        keep = tuple(pieces) if true and method.cached is Cached.EXACT_PREFIX else ()
        lessons = tuple(pieces) if method.recalls else ()
        executed = [*passes.executed, result.executed(self.model)]
        if reshaping is not None:
            surveys = reshaping.multiply_adds.clone()  # decoding will add its own
            executed.append(Executed(ModelCost.of(self.model), heads=0, extra=surveys))
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
        )

    def _assemble(self, method: Method, batch, pieces, cache, watch, layers) -> Assembled:
        if method.cached is Cached.CHUNKS:
            return from_chunks(batch, pieces, cache, self.encoder, self.rope, watch, layers)
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


@dataclass
class Run:
    """A batch after its prefill.

    ``keep`` are the prompts that the prefix cache shall hold, ``lessons`` those whose chunks shall
    be served again with what they attended to.
    """

    server: Server
    batch: Batch
    columns: Rows
    last: Rows
    cache: RowCache
    assembled: Assembled
    prefill: Prefill
    executed: list[Executed]
    watch: Stopwatch
    reshaping: Reshaping | None = None
    keep: tuple[Pieces, ...] = ()
    lessons: tuple[Pieces, ...] = ()

    def tokens(
        self, sampling: Sampling, max_new_tokens: int, streams: Sequence[int] = (0,)
    ) -> Iterator[Tensor]:
        """Decodes: one token per prompt and step, ``(B,)``, -1 for prompts that have ended.

        Args:
            sampling: How tokens are picked.
            max_new_tokens: At least 1.
            streams: Each prompt's own stream of draws.
        """
        for token, _ in self._steps(sampling, max_new_tokens, streams):
            yield token

    def _steps(self, sampling: Sampling, max_new_tokens: int, streams: Sequence[int]):
        steps = decode(
            self.server.model,
            self.cache,
            self.columns,
            self.last,
            self.prefill.logits,
            sampling.picker(self.prefill.logits.device, streams),
            max_new_tokens,
            self.server.stop_ids(),
            self.reshaping,
        )
        self.watch.start()
        first = next(steps)
        self.watch.stop("first_token_s")
        # Nobody waits for it any more.
        self.server.remember(self.cache, self.keep)
        if self.lessons:
            learn(self.server.encoder, self.cache, self.prefill.mass, self.lessons)
        yield first
        yield from steps

    def answers(
        self, sampling: Sampling, max_new_tokens: int, streams: Sequence[int]
    ) -> list[Answer]:
        """Decodes to the end; see `tokens`."""
        steps = torch.stack(list(self.tokens(sampling, max_new_tokens, streams)), dim=1).tolist()
        accounts = self._accounts()
        return [
            self._answer(tuple(token for token in ids if token >= 0), account)
            for ids, account in zip(steps, accounts, strict=True)
        ]

    def continued(self, num_tokens: int) -> tuple[tuple[int, ...], Tensor]:
        """Greedy tokens of a single prompt and the logits after the last, ``(1, V)``."""
        steps = self._steps(Sampling(), num_tokens + 1, (0,))
        made = [step for _, step in zip(range(num_tokens + 1), steps, strict=False)]
        return tuple(int(token) for token, _ in made[:-1]), made[-1][1]

    def _answer(self, ids: tuple[int, ...], account: dict) -> Answer:
        return Answer(self.server.text(ids), ids, Account(**account, answer_tokens=len(ids)))

    def _accounts(self) -> list[dict]:
        computed = self.prefill.layer_tokens(self.server.num_layers).tolist()
        probed = self.prefill.probed().tolist()
        flops = sum(executed.flops() for executed in self.executed).tolist()
        written = self.prefill.bytes_written(self.cache).tolist()
        prompt = (self.columns.kind != Kind.PAD).sum(1).tolist()
        context = self.batch.layout.is_context.sum(1).tolist()
        ttft = Ttft(**self.watch.seconds)
        none = [None] * self.batch.layout.batch_size
        entropy = none if self.reshaping is None else self.reshaping.query_entropy()
        return [
            {
                "prompt_tokens": prompt[index],
                "context_tokens": context[index],
                "layer_tokens": tuple(computed[index]),
                "probed_tokens": probed[index],
                "flops": flops[index],
                "bytes_read": self.assembled.bytes_read[index],
                "bytes_moved": 2 * self.assembled.bytes_read[index] + written[index],
                "chunk_hits": self.assembled.hits[index],
                "chunk_misses": self.assembled.misses[index],
                "ttft": ttft,
                "query_entropy": entropy[index],
            }
            for index in range(self.batch.layout.batch_size)
        ]
