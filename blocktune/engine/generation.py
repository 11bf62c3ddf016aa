"""Decoding: from the first logits to answers, greedy or sampled, in batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from blocktune.attention import planned_forward
from blocktune.attention.cached import CachePlan
from blocktune.cache import cut_exact
from blocktune.cache.decode_cache import DecodingCache
from blocktune.engine.assemble import Assembled
from blocktune.engine.layer_schedule import Prefill
from blocktune.engine.rows import decoded_rows
from blocktune.engine.state import ServedBatch
from blocktune.engine.usage import Executed, Ttft, Usage
from blocktune.layout import Kind, Rows
from blocktune.methods import Cached
from blocktune.methods.base import PrefilledBatch
from blocktune.parsing import check_types, read
from blocktune.prompt import Chunk
from blocktune.registry import require_count

Pick = Callable[[Tensor], Tensor]  # picks tokens ``(B, 1)`` from logits ``(B, V)``


class NoNumbers(ValueError):
    """The model's logits are NaN."""


def require_numbers(logits: Tensor) -> None:
    """Raises `NoNumbers` if any logit is NaN."""
    if logits.isnan().any():
        raise NoNumbers(
            f"the model's logits are not numbers (NaN): its weights hold NaN, or {logits.dtype} "
            "overflows; try dtype float32, or copy the files again"
        )


COLDEST = 1e-4  # below this temperature logits would overflow, so decoding is greedy


@dataclass(frozen=True)
class Sampling:
    """How the next token is picked; default greedy. ValueError: a value is out of range."""

    temperature: float = 0.0  # 0 is greedy; above, logits are divided by it
    top_k: int = 0  # keep this many of the most likely tokens; 0 keeps all
    top_p: float = 1.0  # keep the most likely tokens up to this cumulative probability
    seed: int | None = None  # makes draws reproducible; None: 0, but answers are not cached

    def __post_init__(self):
        check_types(self, "sampling")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be at least 0 (greedy), got {self.temperature}")
        if self.temperature < COLDEST:
            object.__setattr__(self, "temperature", 0.0)
        require_count("top_k", self.top_k, why="0: all tokens")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")

    @classmethod
    def of(cls, given: Sampling | Mapping[str, Any] | None) -> Sampling:
        """Reads an argument ``sampling``. Raises ValueError if it is of another kind."""
        return given if isinstance(given, cls) else read(cls, given or {}, "sampling")

    def picker(self, device: torch.device, streams: Sequence[int]) -> Pick:
        """A function that picks tokens ``(B, 1)`` from logits ``(B, V)``; draws go by stream."""
        if self.temperature == 0:
            return lambda logits: logits.argmax(-1, keepdim=True)
        warpers = LogitsProcessorList([TemperatureLogitsWarper(float(self.temperature))])
        if self.top_k:
            warpers.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            warpers.append(TopPLogitsWarper(float(self.top_p)))
        seeds = [((self.seed or 0) * 1_000_003 + stream) % (1 << 63) for stream in streams]
        generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

        def draw(logits: Tensor) -> Tensor:
            weights = torch.softmax(warpers(None, logits.float()), dim=-1)
            rows = zip(weights, generators, strict=True)
            return torch.stack([torch.multinomial(row, 1, generator=g) for row, g in rows])

        return draw


class TextStream:
    """Incremental detokeniser, whose pieces join to the text of all tokens.

    It holds back an incomplete character, what may be the start of a stop text, and whitespace that
    may have to be stripped. A stop text sets ``stopped``.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stops: Sequence[str] = (),
        strips: bool = True,
        before: Sequence[int] = (),  # tokens that the text continues: a first one loses its space
    ):
        self.tokenizer, self.stops, self.strips = tokenizer, stops, strips
        self.stopped = False
        self._ids = list(before)
        self._text, self._num_shown = "", 0
        # New tokens are decoded together with the earlier ones from the prefix offset on.
        self._prefix_offset, self._read_offset = 0, len(before)

    def whole(self, ids: Sequence[int]) -> str:
        """The text of all tokens. Decoded at once, a broken one may spoil bytes before it."""
        return "".join(map(self.push, ids)) + self.finish()

    def push(self, token: int) -> str:
        """Adds a token. Returns the text that can be shown now, often empty."""
        self._ids.append(token)
        new = self._unread()
        if new and not new.endswith("\ufffd"):
            self._add(new)
            self._prefix_offset, self._read_offset = self._read_offset, len(self._ids)
        return "" if self.stopped else self._show(len(self._text) - self._held())

    def finish(self) -> str:
        """Ends the stream. Returns the rest of the text."""
        if not self.stopped:
            self._add(self._unread())
        return self._show(len(self._text))

    def _unread(self) -> str:
        ends = self._read_offset, len(self._ids)
        parts = [self._ids[self._prefix_offset : end] for end in ends]
        before, after = (self.tokenizer.decode(ids, skip_special_tokens=True) for ids in parts)
        return after[len(before) :]

    def _add(self, text: str) -> None:
        begin = len(self._text)
        self._text += text
        found = [self._text.find(stop, max(0, begin - len(stop))) for stop in self.stops]
        if matches := [at for at in found if at >= 0]:
            self._text, self.stopped = self._text[: min(matches)], True

    def _held(self) -> int:
        """Number of characters at the end that may be the start of a stop text."""
        starts = ((stop[:n], n) for stop in self.stops for n in range(len(stop)))
        return max((n for start, n in starts if self._text.endswith(start)), default=0)

    def _show(self, until: int) -> str:
        text = self._text[:until].strip() if self.strips else self._text[:until]
        new, self._num_shown = text[self._num_shown :], max(self._num_shown, len(text))
        return new


@dataclass(frozen=True)
class Answer:
    """An answer and its cost."""

    text: str  # decoded, without the end of turn
    token_ids: tuple[int, ...]  # as generated, including the end of turn
    usage: Usage  # the cost
    chunks: tuple[Chunk, ...] = ()  # the prompt's chunks, with their metadata


@dataclass(kw_only=True)
class Generation(ServedBatch):
    """A batch after its prefill, ready to decode."""

    last: Rows  # each prompt's last row, ``(B, 1)``
    assembled: Assembled  # what was loaded from caches
    prefill: Prefill  # logits, and the passes that computed them
    executed: list[Executed]  # all passes, for counting operations
    logits: Tensor = field(init=False)  # that the last token was picked from, ``(B, V)``

    def remember(self) -> None:
        """Caches exact prefixes and updates the method's history; once, after the first token."""
        encoder, history = self.state.encoder, self.method.history
        if self.cache.exact and self.method.cached is Cached.EXACT_PREFIX:
            for index, prompt in enumerate(self.pieces):
                ids, start = prompt.shareable, self.assembled.prefix_tokens[index]
                if start < len(ids):
                    exact = cut_exact(self.cache, index, ids, encoder.fingerprint, start=start)
                    self.state.prefixes(self.method).insert(exact)
        if history is not None:
            probe = self.prefill.chunk_probe
            attention = probe and probe.mass / probe.layers  # mean over heads and layers, (B, N, C)
            batch = PrefilledBatch(self.pieces, self.columns, self.cache, attention)
            history.update(encoder.store, encoder.fingerprint, batch)

    def tokens(
        self, sampling: Sampling, max_new_tokens: int, streams: Sequence[int] = (0,)
    ) -> Iterator[Tensor]:
        """Decodes. Yields one token per prompt and step, ``(B,)``, -1 for prompts that have ended.

        Ends when all prompts have produced a stop token (which is yielded) or after
        ``max_new_tokens``. For ``streams`` see `Sampling.picker`.
        """
        logits = self.prefill.logits
        pick = sampling.picker(logits.device, streams)
        stops = torch.tensor(sorted(self.state.stop_ids()), device=logits.device)
        ended = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
        rows = decoded_rows(self.last, max_new_tokens)
        keys = self.columns.concat(rows)
        self.watch.start()
        for step in range(max_new_tokens):
            require_numbers(logits)
            token = pick(logits)
            if step == 0:
                self.watch.stop("first_token_s")
                self.remember()
                if (how := self.state.decode_cache) is not None:
                    self.cache = DecodingCache(how, self.cache, self.reshaping is not None)
            self.logits = logits
            yield token[:, 0].masked_fill(ended, -1)
            ended |= torch.isin(token[:, 0], stops)
            if step + 1 == max_new_tokens or bool(ended.all()):
                return
            logits = self._decode(token, rows, keys, step)

    @torch.no_grad()
    def _decode(self, token: Tensor, rows: Rows, keys: Rows, step: int) -> Tensor:
        """Logits ``(B, V)`` after one more token ``(B, 1)``, whose column is appended."""
        self.cache.append()
        query = rows.map(lambda field: field[:, step : step + 1])
        span = slice(self.cache.first_column, self.cache.num_columns)
        seen = keys.map(lambda field: field[:, span])
        plan = CachePlan(query, seen, self.reshaping)
        output = planned_forward(self.state.model, token, query.position, plan, self.cache)
        return output.logits[:, -1]

    def answers(
        self, sampling: Sampling, max_new_tokens: int, streams: Sequence[int]
    ) -> list[Answer]:
        """Decodes the whole batch; see `tokens`."""
        steps = torch.stack(list(self.tokens(sampling, max_new_tokens, streams)), dim=1).tolist()
        answer_ids = [tuple(token for token in ids if token >= 0) for ids in steps]
        texts = [TextStream(self.state.tokenizer).whole(ids) for ids in answer_ids]
        return list(map(Answer, texts, answer_ids, self.usages(answer_ids)))

    def continued(self, num_tokens: int) -> tuple[tuple[int, ...], Tensor]:
        """Greedy tokens of a single prompt and the logits after the last, ``(1, V)``."""
        ids = [int(token) for token in self.tokens(Sampling(), num_tokens + 1)]
        return tuple(ids[:-1]), self.logits

    def usages(self, answer_ids: list[tuple[int, ...]]) -> list[Usage]:
        """The cost of each prompt's answer, given the answers' tokens."""
        loaded, layout = self.assembled, self.batch.layout
        moved = zip(loaded.bytes_read, self.prefill.bytes_written(self.cache).tolist(), strict=True)
        reshaping, ttft = self.reshaping, Ttft(**self.watch.seconds)
        each = {
            "prompt_tokens": (self.columns.kind != Kind.PAD).sum(1).tolist(),
            "context_tokens": layout.is_context.sum(1).tolist(),
            "layer_tokens": map(tuple, self.prefill.layer_tokens(self.state.num_layers).tolist()),
            "probed_tokens": self.prefill.probed().tolist(),
            "flops": sum(executed.flops() for executed in self.executed).tolist(),
            "bytes_read": loaded.bytes_read,
            "bytes_moved": [2 * read + written for read, written in moved],
            "chunk_hits": loaded.hits,
            "chunk_misses": loaded.misses,
            "answer_tokens": map(len, answer_ids),
            "query_entropy": reshaping.query_entropy() if reshaping else [None] * len(answer_ids),
            "prefix_tokens": loaded.prefix_tokens,
            "prefix_disk_tokens": loaded.prefix_disk_tokens,
        }
        rows = zip(*each.values(), strict=True)
        return [Usage(ttft=ttft, **dict(zip(each, row, strict=True))) for row in rows]
