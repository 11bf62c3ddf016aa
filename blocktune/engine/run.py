"""One batch of requests, from its prefill to answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from blocktune.cache import Recall, RowCache
from blocktune.engine.account import Account, Stopwatch, Ttft
from blocktune.engine.assemble import Assembled
from blocktune.engine.cost import Executed
from blocktune.engine.decode import Sampling, decode
from blocktune.engine.loading import LoadingChoice
from blocktune.engine.prefill import Prefill
from blocktune.engine.recall import learn
from blocktune.layout import Kind, Rows
from blocktune.prompt import Batch, Pieces
from blocktune.reshape import Reshaping

if TYPE_CHECKING:
    from blocktune.engine.server import Server


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


@dataclass
class Run:
    """A batch after its prefill.

    ``keep`` are the prompts that the prefix cache shall hold, ``lessons`` those whose chunks shall
    be served again with what they attended to, as ``recall`` says.
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
    recall: Recall | None = None
    choice: LoadingChoice | None = None

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
        if self.recall is not None:
            mass = self.prefill.mass
            learn(self.server.encoder, self.cache, mass, self.lessons, self.recall)
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
                "loading": self.choice,
            }
            for index in range(self.batch.layout.batch_size)
        ]
