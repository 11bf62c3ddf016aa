"""Requests served up to their first logits: what checks compare and benchmarks time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from blocktune.attention import attach, detach
from blocktune.engine.generation import Run
from blocktune.engine.prompts import PromptMaker, Request
from blocktune.engine.recall import contexts_of
from blocktune.engine.state import Server
from blocktune.methods import Method, build
from blocktune.prompt import LayoutSpec, Pieces, Prompt


class Served:
    """The part of an engine below its answers.

    Attributes:
        model: Attached to blocktune's attention.
        prompts: Makes prompts for the model.
    """

    model: PreTrainedModel
    prompts: PromptMaker
    _server: Server

    def start(self, pieces: Sequence[Pieces], method: str | Method) -> Run:
        """Serves prompts given as token pieces up to their first logits.

        The run holds the logits, the cache, the rows that were computed and the time that each
        part took.
        """
        method = built(method)
        return self._server.start([self.lay_out(p, method) for p in pieces], pieces, method)

    def prefilled(self, examples: Sequence[Request], method: str | Method) -> Run:
        """Like `start`, of examples."""
        method = built(method)
        return self.start([self.prompts.pieces(example, method) for example in examples], method)

    def next_logits(self, examples: Sequence[Request], method: str | Method) -> torch.Tensor:
        """Logits of the first answer token, ``(B, V)``: what equivalence is checked on."""
        return self.prefilled(examples, method).prefill.logits

    def continued_logits(
        self, example: Request, method: str | Method, num_tokens: int
    ) -> tuple[tuple[int, ...], torch.Tensor]:
        """Decodes ``num_tokens`` greedily; their ids, and the logits ``(1, V)`` after them."""
        method = built(method)
        pieces, prompts = self._read([example], method, num_tokens + 1)
        return self._server.start(prompts, pieces, method).continued(num_tokens)

    def lay_out(self, pieces: Pieces, method: Method, max_new_tokens: int = 0) -> Prompt:
        """The rows of a prompt as ``method`` serves it now, by what earlier prompts left behind.

        Raises:
            ValueError: If the method does not fit the model's adapter, or the prompt its context.
        """
        spec = self.prompts.spec(method)
        if method.recall is None:
            return self.prompts.prompt(pieces, spec, max_new_tokens)
        contexts = contexts_of(self._server.encoder.variants, pieces, method.recall)
        spec = LayoutSpec(block=False) if contexts is None else spec
        return self.prompts.prompt(pieces, spec, max_new_tokens, contexts)

    @contextmanager
    def stock_attention(self) -> Iterator[PreTrainedModel]:
        """The model with its own attention, for comparing; blocktune's again after the block."""
        detach(self.model)
        try:
            yield self.model
        finally:
            attach(self.model)

    def _read(
        self, examples: Sequence[Request], method: Method, max_new_tokens: int = 0
    ) -> tuple[list[Pieces], list[Prompt]]:
        pieces = [self.prompts.pieces(example, method) for example in examples]
        return pieces, [self.lay_out(piece, method, max_new_tokens) for piece in pieces]


def built(method: str | Method) -> Method:
    """A method by its name, or the method itself."""
    return build(method) if isinstance(method, str) else method
