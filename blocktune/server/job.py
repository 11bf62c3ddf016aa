"""A request for an engine: its job, the events that it emits, and its final report."""

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from math import ceil
from operator import itemgetter
from typing import Any

import torch
from starlette.exceptions import HTTPException
from transformers import DynamicCache

from blocktune.attention.interface import cache_argument
from blocktune.cache.responses import ResponseCache
from blocktune.engine import Engine
from blocktune.engine.encode import Found, Piece
from blocktune.engine.generation import Generation, NoNumbers
from blocktune.engine.recall import Recall
from blocktune.engine.rows import has_column
from blocktune.engine.usage import Stopwatch, Usage
from blocktune.layout import Kind
from blocktune.methods import Cached, Method
from blocktune.prompt import Chunk, Pieces, Prompt
from blocktune.server.config import Tenant
from blocktune.server.decoding import Choice, Settings, TokenLogprob, token_text

_LOG = logging.getLogger(__name__)


class Busy(HTTPException):
    """The queue is full or the server shuts down; ``retry_after`` is in seconds."""

    def __init__(self, retry_after: float, message: str):
        super().__init__(429, message, {"Retry-After": str(ceil(retry_after))})


@dataclass(frozen=True)
class Delta:
    """New text of a choice; ``finish`` is why it ended, ``stop`` or ``length``, or None."""

    index: int
    text: str
    logprob: TokenLogprob | None
    finish: str | None


@dataclass(frozen=True)
class Report:
    """The end of a request."""

    usage: Usage | None = None  # the work; None if chunks were only encoded
    # where each piece was found: ``memory``, ``disk``, or ``none`` (encoded now)
    tiers: Mapping[Piece, str] = field(default_factory=dict)
    cached_tokens: int = 0  # prompt tokens whose keys and values were in a cache
    answer_tokens: int = 0  # tokens of all choices
    steps: int = 0  # tokens of the longest choice; 0 if none was generated
    queue_s: float = 0.0  # seconds in the queue
    ttft_s: float = 0.0  # seconds from arrival to the first token
    strip: list[dict[str, Any]] | None = None  # see `strip_of`; None: not requested
    encode_s: float = 0.0  # seconds spent encoding


Event = Delta | Report | HTTPException  # the last: the request failed


@dataclass(eq=False)
class Job:
    """A request for an engine."""

    engine: Engine  # with the tenant's salt
    tenant: Tenant  # decides its queue; the queues are served in turn
    documents: tuple[Chunk, ...]  # in prompt order
    timeout_s: float  # seconds after which it fails
    method: Method  # how chunks are reused
    pieces: Pieces | None = None  # tokens of the prompt; None: chunks are only encoded
    prompt: Prompt | None = None  # its layout; None: a method with a history decides it later
    settings: Settings = field(default_factory=Settings)  # how it is decoded
    model: str = ""  # name of the model in the response
    question: str = ""  # text that a semantic response cache compares; empty for none
    strip: bool = False  # whether to report how each token was computed
    has_turns: bool = False  # whether its prefix holds earlier turns of a conversation
    token_bytes: int = 0  # bytes of one token's keys and values
    wanted: Sequence[Piece] = ()  # pieces to encode, if nothing is answered
    pins: frozenset[Piece] = frozenset()  # pieces of ``wanted`` to pin in the store
    # called with its events in the scheduler's thread; the last is a Report or an HTTPException
    emit: Callable[[Event], None] = lambda event: None
    created: float = field(default_factory=time.perf_counter)
    cancelled: bool = False  # if set, it is stopped before its next step
    # The scheduler's:
    begun: float = 0.0  # when it left its queue
    first: float = 0.0  # when it had its first token
    looked_up: list[Piece] = field(default_factory=list)
    found: Found = field(default_factory=Found)
    prefix_hits: int = 0
    missing: deque[list[Piece]] | None = None
    pinned: set[Piece] = field(default_factory=set)  # those that the store could pin
    run: Generation | None = None
    choices: list[Choice] = field(default_factory=list)
    watch: Stopwatch | None = None

    @cached_property
    def num_tokens(self) -> int:
        """Most columns that its answers need."""
        if self.pieces is None:
            return 0
        rows = self.pieces.num_tokens if self.prompt is None else len(self.prompt.input_ids)
        return self.settings.choices * (rows + self.settings.max_new_tokens)

    @property
    def reserved(self) -> int:
        """Most bytes of keys and values that its answers need."""
        return self.num_tokens * self.token_bytes

    @property
    def quota_tokens(self) -> int:
        """Tokens charged to its tenant's quota: those of the prompt, the answers and the chunks."""
        return self.num_tokens + sum(len(piece.ids) for piece in self.wanted)

    def unused_tokens(self, written: int) -> int:
        """Tokens of `quota_tokens` that answers of ``written`` tokens were allowed but lack."""
        most = self.settings.choices * self.settings.max_new_tokens
        return 0 if self.pieces is None else most - written

    @cached_property
    def widened(self) -> list[int]:
        """Layers of which the method needs the chunks' input hidden states."""
        return list(self.engine.state.inputs_of(self.method))


@torch.no_grad()
def bytes_per_token(engine: Engine) -> int:
    """Bytes that one token takes in the caches of all layers, measured by a pass over a token."""
    token, cache = torch.zeros(1, 1, dtype=torch.int64, device=engine.model.device), DynamicCache()
    engine.model(token, use_cache=True, **{cache_argument(engine.model): cache})
    return sum(states.nbytes for layer in cache.layers for states in (layer.keys, layer.values))


def failure_of(error: Exception) -> HTTPException:
    """Turns an exception into one with a status; those not caused by the client are logged."""
    if isinstance(error, NoNumbers):
        _LOG.error("%s", error)
        return HTTPException(500, str(error))
    if isinstance(error, ValueError):
        return HTTPException(400, " ".join(str(error).split()))
    if isinstance(error, torch.OutOfMemoryError):
        _LOG.error("out of memory: %s", error)
        return HTTPException(503, "the device has no memory left; try again later")
    _LOG.error("a request failed", exc_info=error)
    return HTTPException(500, "internal error; the server's log says more")


def report_of(job: Job) -> Report:
    """The report of a job whose choices are all finished."""
    ids = tuple(token for choice in job.choices for token in choice.ids)
    usage = job.run.usages([ids])[0]
    usage = replace(usage, prefix_tokens=usage.prefix_tokens + job.prefix_hits)
    # without a conversation's earlier turns that were in a cache
    encoded = sum(len(piece.ids) for piece in job.found.misses) - job.prefix_hits
    return Report(
        usage=usage,
        tiers=job.found.tiers,
        cached_tokens=max(0, int(job.run.assembled.cached.sum()) - encoded),
        answer_tokens=len(ids),
        steps=max(len(choice.ids) for choice in job.choices),
        queue_s=job.begun - job.created,
        ttft_s=job.first - job.created,
        strip=strip_of(job.run) if job.strip else None,
    )


def strip_of(run: Generation) -> list[dict[str, Any]]:
    """The prompt's tokens, grouped in runs of the same kind, chunk and fate.

    A run has ``kind``, ``chunk`` (or None), ``fate``, ``layers`` (share of the layers that were
    computed) and ``tokens``, their texts. Cached keys and values were ``reused`` unchanged,
    ``relocated`` or ``recomputed`` in some layers; tokens that were not cached are ``computed``.
    """
    layout, state = run.batch.layout, run.state
    is_moved = run.method.cached is not Cached.EXACT_PREFIX
    rows = has_column(layout)[0].nonzero().squeeze(1)
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
        strict=True,
    )
    first, entries = {}, []
    for kind, chunk, cached, layers, position in facts:
        moved = is_moved and kind != Kind.PREFIX and first.setdefault(chunk, position) != 0
        reused = "recomputed" if layers else "relocated" if moved else "reused"
        own = chunk if kind in (Kind.CHUNK, Kind.LINK, Kind.WRAP) else None
        entry = {"kind": Kind(kind).name.lower(), "chunk": own}
        entry |= {"fate": reused if cached else "computed", "layers": layers / state.num_layers}
        entries.append(entry)
    known, ids = len(state.tokenizer), run.batch.input_ids[0, rows].tolist()
    texts = [token_text(state.tokenizer, i) if i < known else "\u29c9" for i in ids]
    groups = groupby(zip(entries, texts, strict=True), itemgetter(0))
    return [entry | {"tokens": [text for _, text in group]} for entry, group in groups]


def recall(cache: ResponseCache, job: Job) -> bool:
    """Answers a job from the cache (True), or arranges for its answer to be cached (False).

    Ignores requests for several choices, logprobs or the strip, and sampling without a seed.
    """
    settings, emit, deltas = job.settings, job.emit, []
    if job.pieces is None or job.strip or settings.choices > 1 or settings.logprobs is not None:
        return False
    how = job.engine.state, job.method, settings.sampling, settings
    entry = Recall.of(cache, *how, job.pieces, job.question)
    if entry is None:
        return False
    if (hit := entry.find()) is not None:
        answer, usage = hit
        emit(Delta(0, answer["text"], None, answer["finish"]))
        ttft_s = time.perf_counter() - job.created
        cached, count = usage.prompt_tokens, answer["count"]  # no token of the prompt was computed
        emit(Report(usage=usage, cached_tokens=cached, answer_tokens=count, ttft_s=ttft_s))
        return True

    def listen(event: Event) -> None:
        if isinstance(event, Delta):
            deltas.append(event)
        if isinstance(event, Report):  # kept before the client knows that its answer has ended
            facts = {"finish": deltas[-1].finish, "count": event.answer_tokens}
            seconds = time.perf_counter() - job.created
            entry.keep("".join(delta.text for delta in deltas), (), seconds, **facts)
        emit(event)

    job.emit = listen
    return False
