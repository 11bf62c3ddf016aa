"""One decoding step for answers of any lengths and methods at once.

The matrices of the model are applied to all answers together; attention is computed for each over
its own cache, with the plan that `Engine` decodes a single answer with. So nothing is padded or
copied when an answer joins or leaves. Models that do more to their cached states than attend decode
one answer after the other. transformers' continuous batching is not used: its paged cache cannot be
given keys and values, tokens recomputed in some layers, gaps between positions, or other scores.
"""

import copy
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from blocktune.attention import planned_forward
from blocktune.attention.cached import CachePlan
from blocktune.attention.kernels import AttentionParams
from blocktune.cache import RowCache
from blocktune.engine import Sampling
from blocktune.engine.generation import Generation, TextStream, require_numbers
from blocktune.engine.rows import decoded_rows
from blocktune.layout import LayerRule, Rows


def token_text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """The text of a token inside a text: some tokenizers drop the space of a first one."""
    return tokenizer.decode([token, token])[len(tokenizer.decode([token])) :]


class TokenLogprob(NamedTuple):
    """A token, its log probability, and the most likely tokens as (id, log probability)."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Settings:
    """How a request is decoded."""

    max_new_tokens: int = 1
    sampling: Sampling = field(default_factory=Sampling)  # each choice draws from its own stream
    choices: int = 1  # answers to make
    stops: tuple[str, ...] = ()  # texts that end an answer and are left out of it
    logprobs: int | None = None  # most likely tokens to report at each step; None: nothing
    strips: bool = True  # whether to strip space around the answer, as `Engine.answer` does


@dataclass(eq=False)
class Choice:
    """One answer that is being decoded."""

    index: int  # among the choices of its request
    run: Generation  # after its prefill, of a single prompt
    settings: Settings
    cache: RowCache = field(init=False)  # keys and values of its columns
    ids: list[int] = field(default_factory=list)  # tokens so far
    finish: str | None = None  # why it ended, or None

    def __post_init__(self):
        run, settings = self.run, self.settings
        last = self.index == settings.choices - 1  # the others decode on copies
        self.cache = run.cache if last else copy.deepcopy(run.cache)
        self.reshaping = run.reshaping if last else copy.deepcopy(run.reshaping)
        sampling = settings.sampling
        if sampling.seed is None:  # as in OpenAI's API, each request gets a new random seed
            sampling = replace(sampling, seed=secrets.randbits(32))
        self._pick = sampling.picker(run.prefill.logits.device, (self.index,))
        self._stop_ids = run.state.stop_ids()
        before = () if settings.strips else run.pieces[0].query[-1:]
        self._text = TextStream(run.state.tokenizer, settings.stops, settings.strips, before)

    @cached_property
    def rows(self) -> Rows:
        """The rows of its future tokens; they do not depend on the first token."""
        return decoded_rows(self.run.last, self.settings.max_new_tokens)

    @cached_property
    def _keys(self) -> Rows:
        return self.run.columns.concat(self.rows)

    def take(self, logits: Tensor) -> tuple[str, TokenLogprob | None]:
        """Picks a token by logits ``(1, V)``; returns the new text and logprobs, or `NoNumbers`."""
        require_numbers(logits)
        token = int(self._pick(logits))
        self.ids.append(token)
        ended = token in self._stop_ids
        text = "" if ended else self._text.push(token)
        if ended or self._text.stopped:
            self.finish = "stop"
        elif len(self.ids) == self.settings.max_new_tokens:
            self.finish = "length"
        if self.finish:
            text += self._text.finish()
        return text, self._logprob(logits[0], token)

    def plan(self) -> CachePlan:
        """Appends a column for the last token and returns the plan of its attention."""
        step = len(self.ids) - 1
        self.cache.append()
        query = self.rows.map(lambda row: row[:, step : step + 1])
        seen = self._keys.map(lambda row: row[:, : self.cache.num_columns])
        return CachePlan(query, seen, self.reshaping)

    def _logprob(self, logits: Tensor, token: int) -> TokenLogprob | None:
        if self.settings.logprobs is None:
            return None
        logs = torch.log_softmax(logits.float(), dim=-1)
        best = logs.topk(min(self.settings.logprobs, len(logs)))
        top = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return TokenLogprob(token, float(logs[token]), tuple(top))


class RaggedPlan:
    """Writes each row of a step into the cache of its own answer, and attends over its columns."""

    def __init__(self, choices: Sequence[Choice]):
        self.plans = [choice.plan() for choice in choices]
        self.caches = [choice.cache for choice in choices]

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, rule: LayerRule, params: AttentionParams
    ) -> Tensor:
        """See `blocktune.attention.interface.Plan.attend`; ``key`` and ``value`` are the rows'."""
        outputs = []
        for index, (plan, cache) in enumerate(zip(self.plans, self.caches, strict=True)):
            states = cache.layers[rule.layer].update(key[index, None], value[index, None])
            outputs.append(plan.attend(query[index, None], *states, rule, params))
        return torch.cat(outputs)


class _Watch:
    """Decodes one answer, and notes whether attention gets exactly what is in its cache."""

    def __init__(self, choice: Choice):
        self.plan, self.cache, self.is_plain = choice.plan(), choice.cache, True

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, rule: LayerRule, params: AttentionParams
    ) -> Tensor:
        layer = self.cache.layers[rule.layer]
        for given, held in ((key, layer.keys), (value, layer.values)):
            self.is_plain &= given.shape == held.shape and given.data_ptr() == held.data_ptr()
        return self.plan.attend(query, key, value, rule, params)


_PLAIN: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
"""Whether a model attends to its cached states unchanged. DeepSeek and DiffLlama expand them."""


@torch.no_grad()
def decode_step(choices: Sequence[Choice]) -> Tensor:
    """Logits ``(B, V)`` after the last token of each answer; all answers are of one model."""
    model, device = choices[0].run.state.model, choices[0].run.prefill.logits.device
    tokens = torch.tensor([[choice.ids[-1]] for choice in choices], device=device)
    positions = [c.rows.position[:, len(c.ids) - 1, None] for c in choices]  # of the last tokens
    if _PLAIN.get(model):
        plan = RaggedPlan(choices)
        return planned_forward(model, tokens, torch.cat(positions), plan).logits[:, -1]
    plans = [_Watch(choice) for choice in choices]
    alone = zip(tokens.split(1), positions, plans, strict=True)
    outputs = [planned_forward(model, *args, args[-1].cache) for args in alone]
    _PLAIN[model] = all(plan.is_plain for plan in plans)
    return torch.cat([output.logits[:, -1] for output in outputs])
