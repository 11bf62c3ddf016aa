"""Builds a stock transformers cache of a prompt's context, to call `generate` without an engine."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from blocktune.attention.interface import cache_argument
from blocktune.data.example import RagExample
from blocktune.engine.batch_prefill import prefill_warm
from blocktune.engine.prompts import PromptMaker
from blocktune.engine.rows import computed_rows, has_column
from blocktune.engine.state import EngineState, unfollowed
from blocktune.layout import Kind
from blocktune.methods import Method
from blocktune.prompt import Chunk, Pieces, Prompt, stack


class _Continued(DynamicCache):
    """The copy of a context's cache that one call of `generate` continues."""

    def __init__(self, context: DynamicCache, prompt_tokens: int):
        super().__init__()
        self.layers = copy.deepcopy(context.layers)
        self.context_tokens, self.prompt_tokens = context.get_seq_length(), prompt_tokens

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        layer = self.layers[layer_idx]
        is_first = layer.get_seq_length() == self.context_tokens
        if is_first and key_states.shape[2] >= self.prompt_tokens:
            raise ValueError(
                "assisted decoding and prompt lookup compute the whole prompt on top of its cached "
                "context; leave these options out"
            )
        if is_first and len(key_states) > len(layer.keys):  # beams, several sequences
            layer.batch_repeat_interleave(len(key_states) // len(layer.keys))
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


@dataclass(frozen=True)
class CachedContext:
    """A stock cache of a prompt's prefix and chunks, made by `Engine.cache`.

    ```python
    context = engine.cache(chunks, "block-attention")
    inputs = context.inputs("Who wrote it?")
    output = engine.model.generate(**inputs, max_new_tokens=32, do_sample=False)
    text = engine.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
    ```
    """

    past_key_values: DynamicCache  # of N tokens, keys rotated to their positions
    input_ids: Tensor  # ``(1, N)``
    position_ids: Tensor  # ``(1, N)``; not 0 to N - 1 with reserved or parallel placement
    question: str | None  # used by the method to select tokens; None: valid for any question
    _lay_out: Callable[[str], Prompt]
    _decoding: dict[str, Any]
    _argument: str  # of `generate`: what transformers calls a cache

    def inputs(self, question: str | None = None) -> dict[str, Any]:
        """Keyword arguments of one call of `generate` that ask a question over the context.

        The question may be omitted if the cache was made for one. The tensors cover the whole
        prompt, ``(1, N + Q)``, which the output repeats: new tokens start at ``N + Q``. Assisted
        decoding is refused. Raises ValueError if no question is given, the cache was made for
        another one, or tokens were appended to the cache itself.
        """
        if self.past_key_values.get_seq_length() != self.input_ids.shape[1]:
            raise ValueError(
                "past_key_values was continued; make a new cache, and generate from inputs() alone"
            )
        query = self.question if question is None else question
        if query is None:
            raise ValueError("inputs() needs a question; this cache was made without one")
        if self.question not in (None, query):
            raise ValueError(
                f"this cache was made for the question {self.question!r:.80}, whose tokens the "
                f"method chose, got {query!r:.80}; make one cache for each"
            )
        batch = stack([self._lay_out(query)], pad_id=0).to(self.input_ids.device)
        ids, rows, *_ = computed_rows(batch, has_column(batch.layout))
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "position_ids": rows.position,
            self._argument: _Continued(self.past_key_values, ids.shape[1]),
            **self._decoding,
        }


def make_context(
    state: EngineState,
    prompts: PromptMaker,
    chunks: Sequence[Chunk],
    method: Method,
    question: str | None,
) -> CachedContext:
    """See `Engine.cache`."""
    if state.recurrence is not None:
        raise ValueError(state.recurrence.refusal.format("a cache of the context"))
    if method.reshape() is not None:
        raise ValueError(
            f"method '{method.name}' reshapes attention, which generate cannot; use engine.answer"
        )
    if question is None and method.select_for(state.num_layers).needs_question:
        raise ValueError(f"method '{method.name}' chooses tokens by the question; give question=")

    def pieces(query: str) -> Pieces:
        return prompts.pieces(RagExample(query, chunks), method)

    def lay_out(query: str) -> Prompt:
        return prompts.prompt(pieces(query), prompts.spec(method))

    ready = prefill_warm(state, prompts, [pieces("?" if question is None else question)], method)
    layout = ready.batch.layout
    count = int(layout.order[layout.kind == Kind.QUERY].min())
    cache = DynamicCache()
    for index, layer in enumerate(ready.cache.layers):
        cache.update(layer.keys[:, :, :count], layer.values[:, :, :count], index)
    ids = computed_rows(ready.batch, has_column(layout)).ids[:, :count]
    decoding = {"eos_token_id": sorted(state.stop_ids()), "pad_token_id": state.encoder.pad_id}
    decoding |= unfollowed(state.model.generation_config)
    argument = cache_argument(state.model)
    about = question, lay_out, decoding, argument
    return CachedContext(cache, ids, ready.columns.position[:, :count], *about)
