"""One thread that runs the engines: it prepares waiting requests and decodes running ones.

A step of the loop does one unit of preparation (encode missing chunks of one request, up to a
number of tokens, or prefill one request), then one token for every running answer. So requests join
and leave while others decode.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from itertools import chain

import torch
from starlette.exceptions import HTTPException

from blocktune.cache import ChunkKV
from blocktune.engine import Engine
from blocktune.engine.batch_prefill import prefill_batch
from blocktune.engine.encode import Found, Piece, grouped, wanted_pieces
from blocktune.engine.usage import Stopwatch
from blocktune.memory import trim_memory
from blocktune.methods import Cached, build
from blocktune.prompt import Pieces
from blocktune.server.config import Limits
from blocktune.server.decoding import Choice, decode_step
from blocktune.server.job import Busy, Delta, Job, Report, failure_of, report_of

PASS_S = 5.0  # seconds that `Scheduler.stop` waits for a pass, such as the check at the start
IDLE_S = 1.0  # seconds without a request after which freed memory is returned to the system


class Scheduler:
    """Runs jobs; ``before`` is called first, in its thread. Any thread may call `submit`.

    Attributes:
        preparing: Admitted requests that do not decode yet, in the order of their turns.
        running: Answers that are decoded.
        kv_bytes: Bytes reserved for the keys and values of both.
        pinned: Bytes of each chunk that clients have pinned in the store, by its key.
    """

    def __init__(self, limits: Limits, before: Callable[[], None] | None = None):
        self.limits = limits
        self.preparing: deque[Job] = deque()
        self.running: dict[Choice, Job] = {}
        self.kv_bytes = 0
        self.pinned: dict[str, int] = {}
        self._before = before
        self._queues: dict[str, deque[Job]] = {}
        self._wake = threading.Condition()
        self._stopping, self._lost = False, ""
        self._thread = threading.Thread(target=self._loop, name="blocktune-engine", daemon=True)

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return sum(map(len, self._queues.values()))

    @property
    def fault(self) -> str:
        """Why no request can be answered before a restart; empty: none."""
        has_ended = self._thread.ident and not (self._thread.is_alive() or self._stopping)
        return "the engine's thread has ended" if has_ended else self._lost

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Finishes what was accepted. Does not wait long for a pass whose answer nobody awaits."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
            is_awaited = not all(job.cancelled for job in self._jobs())
        self._thread.join(None if is_awaited else PASS_S)

    def submit(self, job: Job) -> None:
        """Queues a request. Raises `Busy` if too many wait, or the server stops."""
        with self._wake:
            if self._stopping or self.fault:
                raise Busy(5.0, self.fault or "the server is shutting down")
            if self.waiting >= self.limits.queue:
                raise Busy(1.0 + 0.1 * self.waiting, f"the queue is full ({self.waiting} waiting)")
            self._queues.setdefault(job.tenant.name, deque()).append(job)
            self._wake.notify()

    def _loop(self) -> None:
        if self._before is not None:
            self._before()
        while True:
            with self._wake:
                if not self._wake.wait_for(self._should_wake, IDLE_S):
                    trim_memory()
                    self._wake.wait_for(self._should_wake)
                if not self._jobs():
                    return
                for job in self._jobs():  # also waiting ones
                    if job.cancelled or time.perf_counter() - job.created > job.timeout_s:
                        late = f"not answered within {job.timeout_s:g} s"
                        self._fail(job, HTTPException(408, late))
                self._admit()
            self._prepare_one()
            self._decode_all()

    def _jobs(self) -> dict[Job, None]:
        return dict.fromkeys(
            (*chain(*self._queues.values()), *self.preparing, *self.running.values())
        )

    def _should_wake(self) -> bool:
        return self._stopping or bool(self._jobs())

    def _admit(self) -> None:
        """Admits requests from the queues, tenants in turn, while there is room."""
        while self._queues:
            tenant, queue = next(iter(self._queues.items()))
            job = queue[0]
            live = len(self.running) + sum(j.settings.choices for j in self.preparing)
            is_full = live + job.settings.choices > max(self.limits.running, job.settings.choices)
            if is_full or self.kv_bytes + job.reserved > self.limits.kv_bytes:
                return  # the next request waits for room: no other overtakes a large one
            self._leave_queue(job)
            if queue:
                self._queues[tenant] = self._queues.pop(tenant)  # to the end of the line
            self.kv_bytes += job.reserved
            job.begun = time.perf_counter()
            self.preparing.append(job)

    def _leave_queue(self, job: Job) -> None:
        self._queues[job.tenant.name].remove(job)
        if not self._queues[job.tenant.name]:
            del self._queues[job.tenant.name]

    def _fail(self, job: Job, failure: HTTPException) -> None:
        if failure.status_code == 500:  # some faults of a GPU make all later calls fail
            try:
                Stopwatch(job.engine.model.device).start()  # waits for the device
            except Exception as error:
                self._lost = f"the device is lost: {' '.join(str(error).split()):.200}"
        if not job.begun:
            self._leave_queue(job)
        else:
            if job in self.preparing:
                self.preparing.remove(job)
            self.running = {choice: j for choice, j in self.running.items() if j is not job}
            self._release(job)
        job.emit(failure)

    def _release(self, job: Job) -> None:
        self.kv_bytes -= job.reserved
        # A job and its request refer to each other: its states would stay until a collection.
        job.run, job.choices, job.found = None, [], Found()

    def _prepare_one(self) -> None:
        if not self.preparing:
            return
        job = self.preparing[0]  # it stays, so that the metrics count it
        try:
            is_done = self._prepare(job)
            self.preparing.popleft() if is_done else self.preparing.rotate(-1)
        except Exception as error:
            self._fail(job, failure_of(error))

    @torch.no_grad()
    def _prepare(self, job: Job) -> bool:
        """Does one unit of work; returns whether the request is now decoding or done."""
        if job.missing is None:
            self._look_up(job)
            if job.missing and job.pieces is not None:
                return False
        if job.missing:
            group = job.missing.popleft()
            # Pieces that another request has encoded meanwhile count as found.
            how = job.watch, job.widened
            self._keep(job, job.engine.state.encoder.find(group, *how, documents=job.names))
            if job.missing or job.cancelled:
                return False
        if job.pieces is None:
            report = Report(tiers=job.found.tiers, encode_s=job.watch.seconds.get("encode_s", 0.0))
            self._release(job)
            job.emit(report)
            return True
        self._prefill(job)
        return True

    def _look_up(self, job: Job) -> None:
        engine, encoder = job.engine, job.engine.state.encoder
        job.watch = Stopwatch(engine.model.device)
        job.missing = deque()
        wanted = list(job.wanted)
        if job.pieces is not None:
            if job.prompt is None:
                job.prompt = engine.lay_out(job.pieces, job.method, job.settings.max_new_tokens)
            if job.method.cached is not Cached.CHUNKS:
                return
            job.looked_up = wanted = wanted_pieces(job.prompt)
            if job.method.loader(encoder.store, encoder.fingerprint) is not None:
                store = encoder.store  # read in the prefill, by the method's own loader
                job.found.tiers = {p: "disk" if encoder.key(p) in store else "none" for p in wanted}
                return
        found = encoder.look_up(wanted, job.watch, job.widened)
        self._keep(job, found)
        missing = [piece for piece in found.tiers if piece not in found.kvs]
        if job.has_turns and wanted[0] in missing and not job.widened:
            missing.remove(wanted[0])
            kv, job.prefix_hits = continue_prefix(engine, wanted[0], job.watch)
            job.found.kvs[wanted[0]] = kv
        most = min(self.limits.prefill_tokens, encoder.pass_tokens)
        job.missing = deque(grouped(missing, most))

    def _keep(self, job: Job, found: Found) -> None:
        """Keeps what was found until the prefill, even if evicted; names and pins its chunks."""
        job.found.tiers |= found.tiers
        if job.pieces is not None:
            job.found.kvs |= found.kvs
            job.found.states |= found.states
        encoder = job.engine.state.encoder
        for piece in job.names.keys() & found.kvs.keys():
            encoder.name(piece, found.kvs[piece], job.names[piece])
        for piece in job.pins & found.kvs.keys():
            key, size = encoder.key(piece), found.kvs[piece].num_bytes
            room = self.limits.pinned_bytes - sum(self.pinned.values())  # others may have taken it
            if (key in self.pinned or size <= room) and encoder.store.pin(key):
                self.pinned[key] = size
                job.pinned.add(piece)

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
        job.emit(Delta(choice.index, text, logprob, choice.finish))

    def _decode_all(self) -> None:
        for model in dict.fromkeys(choice.run.state.model for choice in self.running):
            choices = [choice for choice in self.running if choice.run.state.model is model]
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
        self.running = {choice: j for choice, j in self.running.items() if choice.finish is None}
        if any(choice.finish is None for choice in job.choices):
            return
        report = report_of(job)
        self._release(job)
        job.emit(report)


def continue_prefix(engine: Engine, prefix: Piece, watch: Stopwatch) -> tuple[ChunkKV, int]:
    """Computes and stores a conversation's prefix; returns it and its tokens that were cached."""
    state, method = engine.state, build("prefix-cache")
    pieces = Pieces(prefix.ids[:-1], (), prefix.ids[-1:])
    watch.start()
    run = prefill_batch(state, [engine.lay_out(pieces, method)], [pieces], method)
    run.remember()
    encoder = state.encoder
    kv, _ = encoder.extract(run.cache, {}, None, 0, prefix)
    stored = encoder.store.put(encoder.key(prefix), kv, tenant=encoder.tenant)
    watch.stop("encode_s")
    return stored, int(run.assembled.cached.sum())
