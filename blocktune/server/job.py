"""A request for an engine: what it asks, what it is told, and the account of its end."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from blocktune.cache.responses import ResponseCache
from blocktune.engine import Engine
from blocktune.engine.encode import Found, Piece
from blocktune.engine.generation import Generation, NoNumbers
from blocktune.engine.recall import Recall
from blocktune.engine.usage import Stopwatch, Usage
from blocktune.layout import Kind
from blocktune.methods import Method
from blocktune.models.small import config_value
from blocktune.prompt import Pieces, Prompt
from blocktune.server.decoding import Choice, Settings, TokenLogprob

_LOG = logging.getLogger(__name__)
ONE_TOKEN = Settings(1)


class Busy(Exception):
    """The queue is full, or the server is shutting down: try again after some seconds."""

    def __init__(self, retry_after: float, message: str):
        super().__init__(message)
        self.retry_after = retry_after


@dataclass(frozen=True)
class Delta:
    """New text of a choice. ``finish``: why it ended, ``stop`` or ``length``, or None."""

    index: int
    text: str
    logprob: TokenLogprob | None
    finish: str | None


@dataclass(frozen=True)
class Report:
    """The end of a request."""

    usage: Usage | None = None  # of the prompt; None if chunks were only encoded
    # where each piece was found: ``memory``, ``disk``, or ``none`` (encoded)
    tiers: Mapping[Piece, str] = field(default_factory=dict)
    cached_tokens: int = 0  # prompt tokens whose keys and values were in a cache
    answer_tokens: int = 0  # of all choices
    queue_s: float = 0.0  # seconds before preparation began
    ttft_s: float = 0.0  # seconds from arrival to the first token
    # the prompt's tokens and what became of each, if asked
    strip: list[dict[str, Any]] | None = None
    encode_s: float = 0.0  # seconds of encoding


@dataclass(frozen=True)
class Failure:
    """A request that ended without an answer. ``status`` is HTTP's."""

    status: int
    message: str


Event = Delta | Report | Failure


@dataclass(eq=False)
class Job:
    """A request for an engine."""

    engine: Engine  # salted for its tenant
    # how chunks are reused; None: chunks are encoded and nothing is answered
    method: Method | None = None
    pieces: Pieces | None = None  # tokens of the prompt
    # laid out; None for a method with a history, whose layout depends on it
    prompt: Prompt | None = None
    wanted: Sequence[Piece] = ()  # pieces to encode, where nothing is answered
    settings: Settings = ONE_TOKEN  # how it is decoded
    tenant: str = "default"  # whose turn it is; tenants wait in queues of their own, served in turn
    timeout_s: float = 300.0  # seconds until it is given up
    strip: bool = False  # whether to report what became of each token
    has_turns: bool = False  # whether its prefix holds earlier turns of a conversation
    # of ``wanted``, those to keep in memory until they are deleted
    pins: frozenset[Piece] = frozenset()
    token_bytes: int = 0  # bytes of one token's keys and values
    # gets its events, from the scheduler's thread; the last is a Report or a Failure
    emit: Callable[[Event], None] = lambda event: None
    created: float = field(default_factory=time.perf_counter)
    cancelled: bool = False
    looked_up: list[Piece] = field(default_factory=list)
    found: Found = field(default_factory=Found)
    prefix_hits: int = 0
    missing: deque[list[Piece]] | None = None
    begun: float = 0.0
    first: float = 0.0
    run: Generation | None = None
    choices: list[Choice] = field(default_factory=list)
    watch: Stopwatch | None = None

    def cancel(self) -> None:
        """Its next step is not made."""
        self.cancelled = True

    @property
    def quota_tokens(self) -> int:
        """What its tenant's quota is charged: tokens read and to be written."""
        return self.num_tokens + sum(len(piece.ids) for piece in self.wanted)

    @cached_property
    def reserved(self) -> int:
        """Bytes of keys and values that its answers need at most."""
        return self.num_tokens * self.token_bytes

    @cached_property
    def widened(self) -> list[int]:
        """Layers for which the method needs what entered them, beside keys and values."""
        if self.method is None:
            return []
        num_layers = self.engine.state.num_layers
        return list(self.method.select_for(num_layers).widens(num_layers))

    @property
    def num_tokens(self) -> int:
        """Columns that its answers need at most."""
        if self.pieces is None:
            return 0
        rows = self.pieces.num_tokens if self.prompt is None else len(self.prompt.input_ids)
        return self.settings.choices * (rows + self.settings.max_new_tokens)


def bytes_per_token(engine: Engine) -> int:
    """Of keys and values of one column in all layers."""
    config = engine.model.config.get_text_config()
    heads = config_value(config, "num_key_value_heads", "num_attention_heads")
    dim = config_value(config, "head_dim") or config.hidden_size // config_value(
        config, "num_attention_heads"
    )
    return 2 * config.num_hidden_layers * heads * dim * engine.model.dtype.itemsize


def late(job: Job) -> Failure:
    """Of a request that took too long."""
    return Failure(408, f"not answered within {job.timeout_s:g} s")


def failure_of(error: Exception) -> Failure:
    """What a client is told of an exception; what it did not cause is logged."""
    if isinstance(error, NoNumbers):
        _LOG.error("%s", error)
        return Failure(500, str(error))
    if isinstance(error, ValueError):
        return Failure(400, " ".join(str(error).split()))
    if isinstance(error, torch.OutOfMemoryError):
        _LOG.error("out of memory: %s", error)
        return Failure(503, "the device has no memory left; try again later")
    _LOG.error("a request failed", exc_info=error)
    return Failure(500, "internal error; the server's log says more")


def account(job: Job) -> Report:
    """The end of a job whose choices are all finished."""
    ids = tuple(token for choice in job.choices for token in choice.ids)
    usage = job.run.usages([ids])[0]
    usage = replace(usage, prefix_tokens=usage.prefix_tokens + job.prefix_hits)
    lost = sum(len(piece.ids) for piece in job.found.misses)
    lost -= job.prefix_hits  # of a conversation's earlier turns
    return Report(
        usage=usage,
        tiers=job.found.tiers,
        cached_tokens=max(0, int(job.run.assembled.cached.sum()) - lost),
        answer_tokens=len(ids),
        queue_s=job.begun - job.created,
        ttft_s=job.first - job.created,
        strip=strip_of(job.run) if job.strip else None,
    )


FATES = ("reused", "relocated", "recomputed", "computed")
"""What became of a prompt's token: cached keys and values as they were, cached and rotated to
another position, cached but computed again in some layers, or not cached at all."""


def strip_of(run: Generation) -> list[dict[str, Any]]:
    """The prompt's tokens in runs of one kind, chunk and fate.

    Returns:
        Per run ``kind``, ``chunk`` (or None), ``fate``, ``layers`` (share of the layers that were
        computed) and ``tokens``, their texts.
    """
    layout, state = run.batch.layout, run.state
    stored = (layout.kind[0] != Kind.PAD) & (layout.kind[0] != Kind.BLANK)
    rows = stored.nonzero().squeeze(1)
    rows = rows[layout.order[0, rows].argsort()]
    count = torch.zeros(run.columns.kind.shape[1], dtype=torch.int64)
    for plan in run.prefill.plans:
        columns = plan.columns[0][plan.columns[0] >= 0].cpu()
        count[columns] += len(plan.executed)
    facts = zip(
        layout.kind[0, rows].tolist(),
        layout.chunk[0, rows].tolist(),
        run.assembled.cached[0, rows].tolist(),
        count[layout.order[0, rows].cpu()].tolist(),
        layout.position[0, rows].tolist(),
        run.batch.input_ids[0, rows].tolist(),
        strict=True,
    )
    first: dict[int, int] = {}
    made: list[dict[str, Any]] = []
    names, vocabulary = state.tokenizer, len(state.tokenizer)
    for kind, chunk, cached, layers, position, token in facts:
        start = first.setdefault(chunk if kind != Kind.PREFIX else -2, position)
        moved = kind != Kind.PREFIX and start != 0
        fate = FATES[3] if not cached else FATES[2] if layers else FATES[1 if moved else 0]
        one = {
            "kind": Kind(kind).name.lower(),
            "chunk": chunk if kind in (Kind.CHUNK, Kind.LINK, Kind.WRAP) else None,
            "fate": fate,
            "layers": layers / state.num_layers,
        }
        text = names.decode([token]) if token < vocabulary else "\u29c9"
        if made and all(made[-1][name] == value for name, value in one.items()):
            made[-1]["tokens"].append(text)
        else:
            made.append(one | {"tokens": [text]})
    return made


def usage_fields(usage: Usage) -> dict[str, Any]:
    """A usage as plain JSON types."""
    plain = vars(usage) | {"ttft": dict(vars(usage.ttft))}
    return plain | {"recompute_ratio": usage.recompute_ratio}


def recall(cache: ResponseCache, job: Job, question: str) -> bool:
    """Answers a job from the cache (True), or has its answer kept when it has come.

    Requests for several choices, log probabilities or the prompt's strip, and those that draw
    without a seed, pass by. Nothing is kept of an answer whose client left.
    """
    settings, emit, said = job.settings, job.emit, []
    if job.pieces is None or job.strip or settings.choices > 1 or settings.logprobs is not None:
        return False
    decoding, asked = (settings.sampling, settings), (0, job.pieces, question)
    own = Recall.of(cache, job.engine.state, job.method, decoding, asked)
    if own is None:
        return False
    if (known := own.find()) is not None:
        emit(Delta(0, known[0]["text"], None, known[0]["finish"]))
        ttft_s = time.perf_counter() - job.created
        emit(Report(usage=known[1], answer_tokens=known[0]["count"], ttft_s=ttft_s))
        return True

    def listen(event: Event) -> None:
        if isinstance(event, Delta):
            said.append(event)
        if isinstance(event, Report):  # kept before the client knows that its answer has ended
            facts = {"finish": said[-1].finish, "count": event.answer_tokens}
            text, seconds = "".join(delta.text for delta in said), time.perf_counter() - job.created
            own.keep(text, (), seconds, **facts)
        emit(event)

    job.emit = listen
    return False
