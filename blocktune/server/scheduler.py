"""One thread that runs the engines: it prepares waiting requests and decodes running ones.

A step of the loop does two things: one piece of preparation (encode missing chunks of one request
up to a number of tokens, or prefill one request), then one token for every running answer. So
requests join and leave while others decode, and a request with many missing chunks delays the
others by one piece at a time. Two limits: the prefill of a prompt is one piece (in full prefill,
the whole prompt), and so are chunks for methods that load them layer by layer.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from itertools import groupby

import torch

from blocktune.cache import ChunkKV
from blocktune.engine import Engine
from blocktune.engine.batch_prefill import prefill_batch
from blocktune.engine.encode import Found, Piece, grouped, wanted_pieces
from blocktune.engine.usage import Stopwatch
from blocktune.methods import Cached, build
from blocktune.prompt import Pieces
from blocktune.server.config import Limits
from blocktune.server.decoding import Choice, decode_step
from blocktune.server.job import (
    Busy,
    Delta,
    Event,
    Failure,
    Job,
    Report,
    account,
    failure_of,
    late,
)

IDLE_S = 1.0
"""Seconds without a request after which freed memory goes back to the system."""


def give_back() -> None:
    """Lets the C library return what it keeps of freed memory: of one large prompt, all of it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


class Scheduler:
    """See the module. `start` runs `before` first; `submit` may be called by any thread.

    Attributes:
        preparing: Admitted requests that do not decode yet, by the order of their turns.
        running: Answers that are decoded.
        kv_bytes: Reserved for them.
        pinned: Bytes of each chunk that clients have pinned in the store, by its key.
    """

    def __init__(self, limits: Limits, before: Callable[[], None] | None = None):
        self.limits = limits
        self.preparing: OrderedDict[int, Job] = OrderedDict()
        self.running: dict[Choice, Job] = {}
        self.kv_bytes = 0
        self.pinned: dict[str, int] = {}
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
                if not self._wake.wait_for(self._is_called, IDLE_S):
                    give_back()
                    self._wake.wait_for(self._is_called)
                if not self._has_work():
                    return
                over = self._give_up_waiting()
                self._admit()
            for job in over:
                self._tell(job, late(job))
            self._drop_ended()
            self._prepare_one()
            self._decode_all()

    def _has_work(self) -> bool:
        return bool(self.waiting or self.preparing or self.running)

    def _is_called(self) -> bool:
        return self._stopping or self._has_work()

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
        for job in dict.fromkeys(self.running.values()):
            if self._is_over(job):
                self._fail(job, late(job))

    def _fail(self, job: Job, failure: Failure) -> None:
        self.running = {one: its for one, its in self.running.items() if its is not job}
        self._release(job)
        self._tell(job, failure)

    def _release(self, job: Job) -> None:
        self.kv_bytes -= job.reserved
        # A job and the request that waits for it refer to each other, so without this its keys and
        # values would stay until Python looks for cycles.
        job.run, job.choices, job.found = None, [], Found()

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
            # What another request has encoded meanwhile counts as found.
            self._note(job, job.engine.state.encoder.find(group, job.watch, job.widened))
            if job.missing:
                return False
        if job.method is None:
            report = Report(tiers=job.found.tiers, encode_s=job.watch.seconds.get("encode_s", 0.0))
            self._release(job)
            self._tell(job, report)
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
            job.looked_up = wanted = wanted_pieces(job.prompt)
            if job.method.loader(encoder.store, encoder.fingerprint) is not None:
                held = encoder.store  # read in the prefill, by the method's own loader
                job.found.tiers = {p: "disk" if encoder.key(p) in held else "none" for p in wanted}
                return
        found = encoder.look_up(wanted, job.watch, job.widened)
        self._note(job, found)
        missing = [piece for piece in found.tiers if piece not in found.kvs]
        if job.has_turns and wanted[0] in missing and not job.widened:
            missing.remove(wanted[0])
            made, job.prefix_hits = continue_prefix(engine, wanted[0], job.watch)
            job.found.kvs[wanted[0]] = made
        job.missing = deque(parts(missing, self.limits.prefill_tokens))

    def _note(self, job: Job, found: Found) -> None:
        """Keeps what was found until the prefill, whatever leaves the store meanwhile; pins it."""
        job.found.tiers |= found.tiers
        if job.method is not None:
            job.found.kvs |= found.kvs
            job.found.states |= found.states
        encoder = job.engine.state.encoder
        for piece in job.pins & found.kvs.keys():
            if encoder.store.pin(encoder.key(piece)):
                self.pinned[encoder.key(piece)] = found.kvs[piece].num_bytes

    def _prefill(self, job: Job) -> None:
        state, found = job.engine.state, job.found if job.found.kvs else None
        run = prefill_batch(state, [job.prompt], [job.pieces], job.method, found)
        job.found.kvs, job.found.states = {}, {}
        for name, seconds in job.watch.seconds.items():
            run.watch.add(name, seconds)
        job.run = run
        job.choices = [Choice(i, run, job.settings) for i in range(job.settings.choices)]
        self.running |= dict.fromkeys(job.choices, job)
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
            jobs = dict.fromkeys(self.running[choice] for choice in choices)
            try:
                logits = decode_step(choices)
            except Exception as error:
                for job in jobs:
                    self._fail(job, failure_of(error))
                continue
            rows = {choice: logits[index, None] for index, choice in enumerate(choices)}
            for job in jobs:
                try:
                    for choice in job.choices:
                        if choice in rows:
                            self._take(job, choice, rows[choice])
                    self._finish(job)
                except Exception as error:  # of this request alone
                    self._fail(job, failure_of(error))

    def _finish(self, job: Job) -> None:
        self.running = {one: its for one, its in self.running.items() if one.finish is None}
        if any(choice.finish is None for choice in job.choices):
            return
        report = account(job)
        self._release(job)
        self._tell(job, report)


def continue_prefix(engine: Engine, prefix: Piece, watch: Stopwatch) -> tuple[ChunkKV, int]:
    """Computes a conversation's prefix from where an earlier one ended, and stores it.

    Returns its keys and values, and how many of its tokens were in the exact prefix cache.
    """
    state, method = engine.state, build("prefix-cache")
    pieces = Pieces(prefix.ids[:-1], (), prefix.ids[-1:])
    watch.start()
    run = prefill_batch(state, [engine.lay_out(pieces, method)], [pieces], method)
    run.remember()
    span = slice(0, len(prefix.ids))
    keys = tuple(layer.keys[0, :, span] for layer in run.cache.layers)
    values = tuple(layer.values[0, :, span] for layer in run.cache.layers)
    encoder = state.encoder
    kv = ChunkKV(keys, values, torch.tensor(prefix.ids), encoder.fingerprint)
    kept = encoder.store.put(encoder.key(prefix), kv.compact())
    watch.stop("encode_s")
    return kept, int(run.assembled.cached.sum())


def parts(pieces: Iterable[Piece], tokens: int) -> list[list[Piece]]:
    """Pieces in groups of similar length and about this many tokens, at least one per group."""
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
