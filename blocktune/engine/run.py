"""One batch of requests, from prompts to answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blocktune.cache import PrefixTree, RowCache, cut_exact
from blocktune.engine.account import Account, Stopwatch, Ttft
from blocktune.engine.assemble import Assembled, from_chunks, from_prefix
from blocktune.engine.decode import Sampling, decode
from blocktune.engine.encode import Encoder
from blocktune.engine.prefill import Prefill, prefill
from blocktune.engine.rows import column_rows, computed_rows
from blocktune.layout import Kind, Rows
from blocktune.positions import RopeSpec
from blocktune.prompt import Batch, Pieces, Prompt, end_of_turn, stack
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
        cache = RowCache(self.num_layers, *columns.kind.shape, spare=64, exact=exact)
        watch.stop("prompt_s")
        assembled = self._assemble(method, batch, pieces, cache, watch)
        watch.start()
        selection = method.selection()
        fresh = selection.start(layout)
        # Chunk tokens are computed when selected (a cached original is overwritten then); the
        # rest of the prompt whenever no cache holds it.
        chosen = ~assembled.cached
        if not exact:
            chosen = torch.where(layout.is_context, fresh, chosen)
        chosen &= ~layout.is_pad & (layout.kind != Kind.GHOST)
        computed = computed_rows(batch, chosen)
        watch.stop("select_s")
        result = prefill(self.model, computed, columns, cache, selection, layout.is_context.sum(1))
        watch.stop("recompute_s")
        watch.move("recompute_s", "select_s", result.select_s)
        last = computed.rows.map(lambda field: field[:, -1:])
        keep = tuple(pieces) if method.cached is Cached.EXACT_PREFIX else ()
        return Run(self, batch, columns, last, cache, assembled, result, watch, keep)

    def _assemble(self, method: Method, batch, pieces, cache, watch) -> Assembled:
        if method.cached is Cached.CHUNKS:
            return from_chunks(batch, pieces, cache, self.encoder, self.rope, watch)
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
    """A batch after its prefill; ``keep`` are the prompts that the prefix cache shall hold."""

    server: Server
    batch: Batch
    columns: Rows
    last: Rows
    cache: RowCache
    assembled: Assembled
    prefill: Prefill
    watch: Stopwatch
    keep: tuple[Pieces, ...] = ()

    def tokens(self, sampling: Sampling, max_new_tokens: int) -> Iterator[Tensor]:
        """Decodes: one token per prompt and step, ``(B,)``, -1 for prompts that have ended."""
        steps = decode(
            self.server.model,
            self.cache,
            self.columns,
            self.last,
            self.prefill.logits,
            sampling,
            max_new_tokens,
            self.server.stop_ids(),
        )
        self.watch.start()
        first = next(steps)
        self.watch.stop("first_token_s")
        self.server.remember(self.cache, self.keep)  # nobody waits for it any more
        yield first
        yield from steps

    def answers(self, sampling: Sampling, max_new_tokens: int) -> list[Answer]:
        """Decodes to the end."""
        steps = torch.stack(list(self.tokens(sampling, max_new_tokens)), dim=1).tolist()
        accounts = self._accounts()
        return [
            self._answer(tuple(token for token in ids if token >= 0), account)
            for ids, account in zip(steps, accounts, strict=True)
        ]

    def continued(self, num_tokens: int) -> tuple[tuple[int, ...], Tensor]:
        """Greedy tokens of a single prompt and the logits after the last, ``(1, V)``."""
        seen: list[Tensor] = []
        steps = self.tokens(Sampling(), num_tokens + 1)
        hook = self.server.model.register_forward_hook(
            lambda module, args, output: seen.append(output.logits[:, -1])
        )
        try:
            ids = [int(token) for _, token in zip(range(num_tokens + 1), steps, strict=False)]
        finally:
            hook.remove()
        return tuple(ids[:-1]), seen[-1]

    def _answer(self, ids: tuple[int, ...], account: dict) -> Answer:
        return Answer(self.server.text(ids), ids, Account(**account, answer_tokens=len(ids)))

    def _accounts(self) -> list[dict]:
        computed = self.prefill.layer_tokens(self.server.num_layers).tolist()
        prompt = (self.columns.kind != Kind.PAD).sum(1).tolist()
        context = self.batch.layout.is_context.sum(1).tolist()
        ttft = Ttft(**self.watch.seconds)
        return [
            {
                "prompt_tokens": prompt[index],
                "context_tokens": context[index],
                "layer_tokens": tuple(computed[index]),
                "probed_tokens": int(self.prefill.probed[index]),
                "bytes_read": self.assembled.bytes_read[index],
                "chunk_hits": self.assembled.hits[index],
                "chunk_misses": self.assembled.misses[index],
                "ttft": ttft,
            }
            for index in range(self.batch.layout.batch_size)
        ]
