"""One thread that runs the engines: it prepares waiting requests and decodes running ones.

A step of the loop does two things: one piece of preparation (encode missing chunks of one request
up to a number of tokens, or prefill one request), then one token for every running answer. So
requests join and leave while others decode, and a request with many missing chunks delays the
others by one piece at a time. Two limits: the prefill of a prompt is one piece (in full prefill,
the whole prompt), and so are chunks for methods that load them layer by layer.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from typing import Any

import torch

from blocktune.engine import Engine
from blocktune.engine.assemble import wanted_pieces
from blocktune.engine.batch_prefill import prefill_batch
from blocktune.engine.encode import Piece, grouped
from blocktune.engine.generation import Generation
from blocktune.engine.usage import Stopwatch, Usage
from blocktune.layout import Kind
from blocktune.methods import Cached, Method
from blocktune.prompt import Pieces, Prompt, stack
from blocktune.server.config import Limits
from blocktune.server.decoding import Choice, Settings, TokenLogprob, decode_step

_LOG = logging.getLogger(__name__)


ONE_TOKEN = Settings(1)


class Busy(Exception):
    """The queue is full, or the server is shutting down: try again after some seconds."""

    def __init__(self, retry_after: float, message: str):
        super().__init__(message)
        self.retry_after = retry_after


@dataclass(frozen=True)
class Delta:
    """New text of a choice. ``finish``: why it ended, ``stop`` or ``length``; None: it goes on."""

    index: int
    text: str
    logprob: TokenLogprob | None
    finish: str | None


@dataclass(frozen=True)
class Report:
    """The end of a request.

    Attributes:
        usage: Of the prompt; None if chunks were only encoded.
        tiers: Where each piece was found: ``memory``, ``disk``, or ``none`` (encoded).
        cached_tokens: Prompt tokens whose keys and values were in a cache.
        answer_tokens: Of all choices.
        queue_s: Seconds before preparation began.
        ttft_s: Seconds from arrival to the first token.
        strip: The prompt's tokens and what became of each, if asked.
        encode_s: Seconds of encoding.
    """

    usage: Usage | None = None
    tiers: tuple[tuple[Piece, str], ...] = ()
    cached_tokens: int = 0
    answer_tokens: int = 0
    queue_s: float = 0.0
    ttft_s: float = 0.0
    strip: list[dict[str, Any]] | None = None
    encode_s: float = 0.0


@dataclass(frozen=True)
class Failure:
    """A request that ended without an answer. ``status`` is HTTP's."""

    status: int
    message: str


Event = Delta | Report | Failure


@dataclass(eq=False)
class Job:
    """A request for an engine.

    Attributes:
        engine: Salted for its tenant.
        emit: Gets its events, from the scheduler's thread; the last is a Report or a Failure.
        method: How chunks are reused; None: chunks are encoded and nothing is answered.
        pieces: Tokens of the prompt.
        prompt: Laid out; None for a method with a history, whose layout depends on it.
        wanted: Pieces to encode, where nothing is answered.
        settings: How it is decoded.
        tenant: Whose turn it is; tenants wait in queues of their own, served in turn.
        timeout_s: Seconds until it is given up.
        strip: Whether to report what became of each token.
    """

    engine: Engine
    method: Method | None = None
    pieces: Pieces | None = None
    prompt: Prompt | None = None
    wanted: Sequence[Piece] = ()
    settings: Settings = ONE_TOKEN
    tenant: str = "default"
    timeout_s: float = 300.0
    strip: bool = False
    emit: Callable[[Event], None] = lambda event: None
    created: float = field(default_factory=time.perf_counter)
    cancelled: bool = False
    looked_up: list[Piece] = field(default_factory=list)
    tiers: dict[Piece, str] = field(default_factory=dict)
    missing: deque[list[Piece]] | None = None
    reserved: int = 0
    begun: float = 0.0
    first: float = 0.0
    run: Generation | None = None
    choices: list[Choice] = field(default_factory=list)
    watch: Stopwatch | None = None

    def cancel(self) -> None:
        """Its next step is not made."""
        self.cancelled = True

    @property
    def num_tokens(self) -> int:
        """Columns that its answers need at most."""
        if self.pieces is None:
            return 0
        rows = self.pieces.num_tokens if self.prompt is None else len(self.prompt.ids)
        return self.settings.choices * (rows + self.settings.max_new_tokens)


class Scheduler:
    """See the module. `start` runs `before` first; `submit` may be called by any thread."""

    def __init__(self, limits: Limits, before: Callable[[], None] | None = None):
        self.limits = limits
        self.preparing: OrderedDict[int, Job] = OrderedDict()
        self.running: list[Choice] = []
        self.kv_bytes = 0
        self._jobs_of: dict[int, Job] = {}
        self._before = before
        self._queues: OrderedDict[str, deque[Job]] = OrderedDict()
        self._count = itertools.count()
        self._wake = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._loop, name="blocktune-engine", daemon=True)

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return sum(map(len, self._queues.values()))

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self, timeout_s: float | None = None) -> None:
        """Finishes what was accepted, then ends the thread."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join(timeout_s)

    def submit(self, job: Job) -> None:
        """Queues a request.

        Raises:
            Busy: If too many wait, or the server stops.
            ValueError: If its answers would never fit into the memory for keys and values.
        """
        job.reserved = job.num_tokens * bytes_per_token(job.engine)
        if job.reserved > self.limits.kv_bytes:
            raise ValueError(
                f"the prompt and its answers need {job.reserved:,} bytes of keys and values, the "
                f"server has {self.limits.kv_bytes:,}; ask for fewer tokens or choices"
            )
        with self._wake:
            if self._stopping:
                raise Busy(5.0, "the server is shutting down")
            if self.waiting >= self.limits.queue:
                raise Busy(1.0 + 0.1 * self.waiting, f"{self.waiting} requests are waiting already")
            self._queues.setdefault(job.tenant, deque()).append(job)
            self._wake.notify()

    def _loop(self) -> None:
        if self._before is not None:
            self._before()
        while True:
            with self._wake:
                while not (self.waiting or self.preparing or self.running):
                    if self._stopping:
                        return
                    self._wake.wait()
                over = self._give_up_waiting()
                self._admit()
            for job in over:
                self._tell(job, late(job))
            self._drop_ended()
            self._prepare_one()
            self._decode_all()

    def _give_up_waiting(self) -> list[Job]:
        """Takes out of the queues what nobody waits for any more, or has waited too long."""
        over = [job for queue in self._queues.values() for job in queue if self._is_over(job)]
        for tenant, queue in list(self._queues.items()) if over else ():
            self._queues[tenant] = deque(job for job in queue if job not in over)
            if not self._queues[tenant]:
                del self._queues[tenant]
        return over

    def _admit(self) -> None:
        """Takes requests out of the queues, tenants in turn, while there is room for them."""
        while self._queues:
            tenant, queue = next(iter(self._queues.items()))
            job = queue[0]
            live = len(self.running) + sum(one.settings.choices for one in self.preparing.values())
            full = live + job.settings.choices > max(self.limits.running, job.settings.choices)
            if full or self.kv_bytes + job.reserved > self.limits.kv_bytes:
                return  # whose turn it is waits for room: nobody overtakes a large request
            queue.popleft()
            del self._queues[tenant]
            if queue:
                self._queues[tenant] = queue
            self.kv_bytes += job.reserved
            job.begun = time.perf_counter()
            self.preparing[next(self._count)] = job

    def _is_over(self, job: Job) -> bool:
        return job.cancelled or time.perf_counter() - job.created > job.timeout_s

    def _drop_ended(self) -> None:
        """Forgets requests whose client left, and gives up those that take too long."""
        over = [(key, job) for key, job in self.preparing.items() if self._is_over(job)]
        for key, job in over:
            del self.preparing[key]
            self._fail(job, late(job))
        for job in {id(one): one for one in map(self._job, self.running)}.values():
            if self._is_over(job):
                self._fail(job, late(job))

    def _job(self, choice: Choice) -> Job:
        return self._jobs_of[id(choice.run)]

    def _fail(self, job: Job, failure: Failure) -> None:
        self.running = [one for one in self.running if one not in job.choices]
        self._release(job)
        self._tell(job, failure)

    def _release(self, job: Job) -> None:
        self.kv_bytes -= job.reserved
        if job.run is not None:
            self._jobs_of.pop(id(job.run), None)

    @staticmethod
    def _tell(job: Job, event: Event) -> None:
        if not job.cancelled:
            job.emit(event)

    def _prepare_one(self) -> None:
        """One piece of work for the request whose turn it is."""
        if not self.preparing:
            return
        key, job = self.preparing.popitem(last=False)
        try:
            if self._prepare(job):
                return
            self.preparing[key] = job  # the next one's turn
        except Exception as error:
            self._fail(job, failure_of(error))

    @torch.no_grad()
    def _prepare(self, job: Job) -> bool:
        """Whether the request is ready, and decoding or done."""
        if job.missing is None:
            self._look_up(job)
            if job.missing and job.method is not None:
                return False
        if job.missing:
            group = job.missing.popleft()
            layers = () if job.method is None else widened(job)
            found = job.engine.state.encoder.find(group, job.watch, layers)
            for piece in found.hits:  # another request encoded it meanwhile
                job.tiers[piece] = "memory"
            if job.missing:
                return False
        if job.method is None:
            self._release(job)
            encode_s = job.watch.seconds.get("encode_s", 0.0)
            self._tell(job, Report(tiers=tuple(job.tiers.items()), encode_s=encode_s))
            return True
        self._prefill(job)
        return True

    def _look_up(self, job: Job) -> None:
        """Which pieces are cached where, and which must be encoded."""
        engine, encoder = job.engine, job.engine.state.encoder
        job.watch = Stopwatch(engine.model.device)
        job.missing = deque()
        wanted = list(job.wanted)
        if job.method is not None:
            if job.prompt is None:
                job.prompt = engine.lay_out(job.pieces, job.method, job.settings.max_new_tokens)
            if job.method.cached is not Cached.CHUNKS:
                return
            job.looked_up = wanted = wanted_pieces(stack([job.prompt], engine.state.pad_id), 0)
            if job.method.loader(encoder.store, encoder.fingerprint) is not None:
                for piece in wanted:  # read and encoded in the prefill, by the method's own loader
                    job.tiers[piece] = "disk" if encoder.key(piece) in encoder.store else "none"
                return
        for piece in dict.fromkeys(wanted):
            found = encoder.store.lookup(encoder.key(piece), piece.ids, encoder.fingerprint)
            job.watch.add("lookup_s", found.lookup_s)
            job.watch.add("load_s", found.load_s)
            job.tiers[piece] = found.tier
        missing = [piece for piece, tier in job.tiers.items() if tier == "none"]
        job.missing = deque(parts(missing, self.limits.prefill_tokens))

    def _prefill(self, job: Job) -> None:
        state = job.engine.state
        run = prefill_batch(state, [job.prompt], [job.pieces], job.method)
        for name, seconds in job.watch.seconds.items():
            run.watch.add(name, seconds)
        job.run = run
        self._jobs_of[id(run)] = job
        job.choices = [Choice(i, run, job.settings) for i in range(job.settings.choices)]
        self.running += job.choices
        run.watch.start()
        for choice in job.choices:
            self._take(job, choice, run.prefill.logits)
        run.watch.stop("first_token_s")
        run.remember()
        self._finish(job)

    def _take(self, job: Job, choice: Choice, logits: torch.Tensor) -> None:
        text, logprob = choice.take(logits)
        job.first = job.first or time.perf_counter()
        self._tell(job, Delta(choice.index, text, logprob, choice.finish))

    def _decode_all(self) -> None:
        """One token for every running answer, those of one model together."""
        by_model = sorted(self.running, key=lambda one: id(one.run.state.model))
        for _, group in groupby(by_model, key=lambda one: id(one.run.state.model)):
            choices = list(group)
            jobs = {id(one.run): self._job(one) for one in choices}
            try:
                logits = decode_step(choices)
            except Exception as error:
                for job in jobs.values():
                    self._fail(job, failure_of(error))
                continue
            of_run = {key: [] for key in jobs}
            for index, choice in enumerate(choices):
                of_run[id(choice.run)].append((choice, logits[index, None]))
            for key, job in jobs.items():
                try:
                    for choice, row in of_run[key]:
                        self._take(job, choice, row)
                    self._finish(job)
                except Exception as error:  # of this request alone
                    self._fail(job, failure_of(error))

    def _finish(self, job: Job) -> None:
        self.running = [one for one in self.running if one.finish is None]
        if any(choice.finish is None for choice in job.choices):
            return
        ids = tuple(token for choice in job.choices for token in choice.ids)
        usage = job.run.usages([ids])[0]
        misses = _missed_chunks(job)
        if misses is not None:
            hits = len(job.pieces.chunks) - misses
            usage = replace(usage, chunk_hits=hits, chunk_misses=misses)
        lost = sum(len(piece.ids) for piece, tier in job.tiers.items() if tier == "none")
        report = Report(
            usage=usage,
            tiers=tuple(job.tiers.items()),
            cached_tokens=max(0, int(job.run.assembled.cached.sum()) - lost),
            answer_tokens=len(ids),
            queue_s=job.begun - job.created,
            ttft_s=job.first - job.created,
            strip=strip_of(job.run) if job.strip else None,
        )
        self._release(job)
        self._tell(job, report)


def _missed_chunks(job: Job) -> int | None:
    """Chunks that had to be encoded; None if the engine looked them up by itself."""
    if not job.tiers:
        return None
    chunks = job.looked_up[1:] if job.pieces.prefix else job.looked_up
    return sum(job.tiers.get(piece) == "none" for piece in chunks)


def widened(job: Job) -> list[int]:
    """Layers for which the method needs what entered them, beside keys and values."""
    num_layers = job.engine.state.num_layers
    return list(job.method.select_for(num_layers).widens(num_layers))


def parts(pieces: Iterable[Piece], tokens: int) -> list[list[Piece]]:
    """Pieces in groups of similar length and about so many tokens, at least one a group."""
    made: list[list[Piece]] = []
    for group in grouped(pieces):
        room = 0
        for piece in group:
            size = len(piece.blanks) + len(piece.ids)
            if size > room:
                made.append([])
                room = tokens
            made[-1].append(piece)
            room -= size
    return made


def bytes_per_token(engine: Engine) -> int:
    """Of keys and values of one column in all layers."""
    config = engine.model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * dim * engine.model.dtype.itemsize


def late(job: Job) -> Failure:
    """Of a request that took too long."""
    return Failure(408, f"not answered within {job.timeout_s:g} s")


def failure_of(error: Exception) -> Failure:
    """What a client is told of an exception; what it did not cause is logged."""
    if isinstance(error, ValueError):
        return Failure(400, " ".join(str(error).split()))
    if isinstance(error, torch.OutOfMemoryError):
        _LOG.error("out of memory: %s", error)
        return Failure(503, "the device has no memory left; try again later")
    _LOG.error("a request failed", exc_info=error)
    return Failure(500, "internal error; the server's log says more")


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
    values = asdict(usage)
    values.pop("loading")
    return values | {"recompute_ratio": usage.recompute_ratio}
