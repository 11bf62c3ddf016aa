"""One HTTP request with its job: passes events on, and cancels the job if the client leaves."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from blocktune.methods.base import METHODS
from blocktune.server.bodies import TextBodies
from blocktune.server.config import Tenant
from blocktune.server.job import Busy, Delta, Event, Job, Report, recall
from blocktune.server.middleware import SHUT_DOWN, error_body
from blocktune.server.schemas import Decoding, T, WrongField, read_body
from blocktune.server.service import Service

_LOG = logging.getLogger("blocktune.server")
STREAMED = {"cache-control": "no-cache", "x-accel-buffering": "no"}  # nginx must not collect events
BEAT_S = 15.0  # seconds between comments in a stream: proxies end one that is silent for long


async def authorized(request: Request) -> Tenant:
    """The tenant that sends a request. Raises HTTPException if it has no key of a tenant."""
    tenant = request.app.state.service.config.tenant_of(request.headers.get("authorization"))
    if tenant is None:
        raise HTTPException(401, "no API key, or a wrong one; send Authorization: Bearer KEY")
    return tenant


async def begin(
    request: Request, kind: type[T], make: Callable[[Service, T, Tenant], Job]
) -> tuple[Exchange, T]:
    """Reads a request of some kind in a worker thread, makes its job, and queues it.

    Raises HTTPException if the body is not JSON, WrongField if it is invalid or can never fit, Busy
    if too many requests wait or the tenant's quota is used up.
    """
    service, tenant = request.app.state.service, await authorized(request)
    _require_json(request)
    raw, most = await request.body(), 2 * service.config.limits.prompt_tokens

    def read() -> tuple[T, Job]:
        body = read_body(kind, raw, most)
        return body, make(service, body, tenant)

    try:
        body, job = await asyncio.to_thread(read)
    except WrongField:
        raise
    except ValueError as error:
        line = " ".join(str(error).split())
        raise WrongField(line, code=getattr(error, "code", None)) from None
    if (wait := service.quotas.enter(tenant, job.quota_tokens)) is not None:
        raise Busy(wait, f"the quota of '{tenant.name}' is used up")
    exchange, cache = Exchange(service, job, request), service.responses
    try:
        if not cache or not await asyncio.to_thread(recall, cache, job):
            service.scheduler.submit(job)
    except BaseException:
        exchange.close(refund=job.quota_tokens)
        raise
    return exchange, body


def _require_json(request: Request) -> None:
    """Refuses other content types; pages of other sites can send text/plain, but not JSON."""
    kind, _, options = request.headers.get("content-type", "").lower().partition(";")
    charset = options.partition("charset=")[2].partition(";")[0].strip(' "')
    if kind.strip() != "application/json" or charset not in ("", "utf-8", "utf8"):
        raise HTTPException(415, "send JSON in UTF-8, as Content-Type: application/json")
    coding = request.headers.get("content-encoding", "identity")
    if coding != "identity":
        raise HTTPException(415, f"Content-Encoding '{coding:.40}' is not read; send plain JSON")


class Exchange:
    """A request that its tenant's quota admitted; its job need not be queued yet."""

    def __init__(self, service: Service, job: Job, request: Request):
        self.service, self.job, self.request = service, job, request
        self._queue: asyncio.Queue[Event] = asyncio.Queue()
        self._open = True
        loop = asyncio.get_running_loop()

        def emit(event: Event) -> None:
            try:
                loop.call_soon_threadsafe(self._queue.put_nowait, event)
            except RuntimeError:  # the loop is closed: no client waits any more
                job.cancelled = True

        job.emit = emit

    def close(self, refund: int = 0) -> None:
        """Ends the exchange and cancels the rest of its job; ``refund`` tokens are not charged."""
        self.job.cancelled = True
        if self._open:
            self._open = False
            self.service.quotas.leave(self.job.tenant, refund)

    async def events(self) -> AsyncGenerator[Delta | Report | None]:
        """The job's events, the report last, None every `BEAT_S`; or HTTPException if it fails."""
        watch, job, written = asyncio.create_task(self._watch()), self.job, 0
        try:
            while True:
                event = await self._queue.get()
                if isinstance(event, HTTPException):
                    raise event
                if isinstance(event, Report):
                    self.close(refund=job.unused_tokens(event.answer_tokens))
                    yield event
                    return
                written += event is not None
                yield event
        finally:
            watch.cancel()
            self.close(refund=job.unused_tokens(written))

    async def _watch(self) -> None:
        kind = ""
        while kind != "http.disconnect":
            try:
                kind = (await asyncio.wait_for(self.request.receive(), BEAT_S))["type"]
            except TimeoutError:
                self._queue.put_nowait(None)
        self.job.cancelled = True
        self._queue.put_nowait(HTTPException(499, "the client has left"))

    async def respond(self, kind: type[TextBodies], body: Decoding) -> Response:
        """The whole answer, or a stream, as soon as its first event is there."""
        bodies, events = kind(self.job), self.events()
        first = await anext(events)
        if body.stream:
            with_usage = body.stream_options and body.stream_options.include_usage
            stream = self._stream(bodies, first, events, bool(with_usage))
            return EventStream(stream, headers=STREAMED)
        bodies.add(first)
        async for event in events:
            bodies.add(event)
        self._log(event, bodies)
        return JSONResponse(bodies.whole(event))

    async def _stream(
        self, bodies: TextBodies, event: Event | None, events: AsyncGenerator, with_usage: bool
    ) -> AsyncIterator[bytes]:
        try:
            yield _sse(*bodies.opening())
            while not isinstance(event, Report):
                yield b": waiting\n\n" if event is None else _sse(*bodies.delta(event))
                event = await anext(events)
            self._log(event, bodies)
            if with_usage:
                yield _sse(bodies.closing(event))
            yield b"data: [DONE]\n\n"
        except asyncio.CancelledError:  # the time to finish after SIGTERM is over
            yield _sse(error_body(SHUT_DOWN, 503))
        except HTTPException as error:
            _LOG.info("%s ended early, status=%d", bodies.id, error.status_code)
            yield _sse(error_body(str(error.detail), error.status_code))
        finally:
            await events.aclose()

    def _log(self, report: Report, bodies: TextBodies) -> None:
        job, usage, tenant = self.job, report.usage, self.job.tenant.name
        total_s = time.perf_counter() - job.created
        # Without parameters: each combination of them would be a time series of its own.
        labels = job.model, METHODS.name_of(job.method), tenant
        self.service.metrics.record(labels, report, total_s)
        _LOG.info(
            "%s model=%s method=%r tenant=%s prompt=%d cached=%d answer=%d queue=%.4fs "
            "ttft=%.4fs total=%.4fs%s",
            *(bodies.id, job.model, job.method.name, tenant, usage.prompt_tokens),
            *(report.cached_tokens, report.answer_tokens, report.queue_s, report.ttft_s, total_s),
            f" text={bodies.texts}" if self.service.config.log_texts else "",
        )


class EventStream(StreamingResponse):
    """Server-sent events; `Exchange` itself notices when the client leaves."""

    media_type = "text/event-stream"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        await self.stream_response(send)


def _sse(*bodies: dict[str, Any]) -> bytes:
    return b"".join(b"data: " + json.dumps(body).encode() + b"\n\n" for body in bodies)
