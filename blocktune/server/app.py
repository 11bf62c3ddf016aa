"""The routes: OpenAI's interface, the chunks, the page, health and metrics."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

import blocktune
from blocktune.server.config import Quotas, ServerConfig, Tenant
from blocktune.server.decoding import TokenLogprob
from blocktune.server.front import usage_body
from blocktune.server.middleware import Guard, error_body
from blocktune.server.scheduler import Busy, Delta, Event, Failure, Report, usage_fields
from blocktune.server.schemas import (
    ChatRequest,
    ChunkList,
    ChunksRequest,
    ChunkStatus,
    CompletionRequest,
    ErrorBody,
    ModelCard,
    ModelList,
)
from blocktune.server.service import Asked, Service, UnknownModel

_LOG = logging.getLogger("blocktune.server")
ERRORS = {
    status: {"model": ErrorBody, "description": text}
    for status, text in {
        400: "The request is wrong; the message says what.",
        401: "No API key, or a wrong one.",
        404: "No such model or chunk.",
        408: "Not answered in time.",
        413: "The body is too large.",
        429: "Too many requests; see Retry-After.",
    }.items()
}
KEY = re.compile(r"[0-9a-f]{64}(-[0-9a-f]{16})?")


def tenant_of(request: Request) -> Tenant:
    """Who calls.

    Raises:
        HTTPException: If the request has no key of a tenant.
    """
    config: ServerConfig = request.app.state.config
    tenant = config.tenant_of(request.headers.get("authorization"))
    if tenant is None:
        raise HTTPException(401, "no API key, or a wrong one; send Authorization: Bearer KEY")
    return tenant


Caller = Annotated[Tenant, Depends(tenant_of)]


def create_app(service: Service) -> FastAPI:
    """The application around a `Service`; its scheduler runs while the application does."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.scheduler.start()
        yield
        service.draining = True
        await asyncio.to_thread(service.scheduler.stop)

    app = FastAPI(title="blocktune", version=blocktune.__version__, lifespan=lifespan)
    app.state.config = config = service.config
    limits = config.limits
    quotas = Quotas()
    app.add_middleware(
        Guard, max_bytes=limits.body_bytes, max_s=limits.body_s, metrics=service.metrics
    )
    if config.hosts != ("*",):
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(config.hosts))
    _add_errors(app)

    async def begin(tenant: Tenant, request: Request, make: Callable[[], Asked]) -> Exchange:
        try:
            asked = await asyncio.to_thread(make)
        except UnknownModel:
            raise
        except ValueError as error:
            raise HTTPException(400, " ".join(str(error).split())) from None
        wait = quotas.enter(tenant, asked.job.num_tokens)
        if wait is not None:
            raise Busy(wait, f"the quota of '{tenant.name}' is used up")
        exchange = Exchange(service, asked, tenant, request, lambda: quotas.leave(tenant))
        try:
            exchange.submit()
        except BaseException:
            exchange.close()
            raise
        return exchange

    @app.post("/v1/chat/completions", response_model=None, responses=ERRORS)
    async def chat(body: ChatRequest, request: Request, tenant: Caller) -> Response:
        """Answers the user's last message from the documents."""
        exchange = await begin(tenant, request, lambda: service.chat(body, tenant))
        return await exchange.respond(ChatBodies(exchange), body)

    @app.post("/v1/completions", response_model=None, responses=ERRORS)
    async def complete(body: CompletionRequest, request: Request, tenant: Caller) -> Response:
        """Continues a text, after documents if there are any."""
        exchange = await begin(tenant, request, lambda: service.completion(body, tenant))
        return await exchange.respond(TextBodies(exchange), body)

    @app.get("/v1/models", responses=ERRORS)
    async def models(tenant: Caller) -> ModelList:
        """The models and adapters that are served."""
        return ModelList(data=[card(name) for name in service.models])

    @app.get("/v1/models/{name:path}", responses=ERRORS)
    async def model(name: str, tenant: Caller) -> ModelCard:
        """One of them."""
        return card(service.model(name).name)

    def card(name: str) -> ModelCard:
        served = service.models[name]
        return ModelCard(
            id=name,
            created=service.created,
            max_model_len=served.engine.prompts.max_tokens,
            method=served.method.name,
        )

    @app.post("/v1/chunks", responses=ERRORS)
    async def encode(body: ChunksRequest, request: Request, tenant: Caller) -> ChunkList:
        """Encodes documents ahead of any question."""
        if body.pin:
            raise HTTPException(400, "pin: this server's store cannot pin chunks; leave it out")
        exchange = await begin(
            tenant,
            request,
            lambda: service.encoding(body.model, body.documents, body.cache_salt, tenant),
        )
        report = await exchange.report()
        return exchange.chunk_list(report)

    @app.get("/v1/chunks/{key}", responses=ERRORS)
    async def status(key: str, tenant: Caller) -> ChunkStatus:
        """Whether a chunk is in the store; ``key`` is from ``POST /v1/chunks`` or an answer."""
        stores = {id(one.engine.store): one.engine.store for one in service.models.values()}
        known = own_key(key, tenant)
        found = any(known in store for store in stores.values())
        return ChunkStatus(key=key, cached="stored" if found else "none")

    @app.delete("/v1/chunks/{key}", responses=ERRORS)
    async def delete(key: str, tenant: Caller) -> ChunkStatus:
        """Drops a chunk from memory and from the folder."""
        known = own_key(key, tenant)
        for served in service.models.values():
            await asyncio.to_thread(served.engine.store.discard, known)
        return ChunkStatus(key=key, cached="none")

    def own_key(name: str, tenant: Tenant) -> str:
        known = tenant.verify(name) if KEY.fullmatch(name) else None
        if known is None:
            raise HTTPException(404, "no such chunk")
        return known

    @app.get("/v1/methods", responses=ERRORS)
    async def methods(tenant: Caller) -> list[dict[str, Any]]:
        """Reuse methods that requests may name, with their parameters."""
        from blocktune.methods import describe_all

        return [
            {"name": one.name, "kind": one.kind, "weights": one.weights, "summary": one.summary}
            for one in describe_all()
        ]

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Whether the process answers."""
        return {"status": "ok"}

    @app.get("/ready", responses={503: {"model": ErrorBody}})
    async def ready() -> Response:
        """Whether the correctness check has passed and requests are taken."""
        if service.ready and not service.draining:
            return JSONResponse({"status": "ready"})
        reason = "; ".join(service.faults) or ("draining" if service.draining else "checking")
        return JSONResponse(error_body(reason, 503), 503)

    @app.get("/metrics", response_class=Response, responses=ERRORS)
    async def metrics(tenant: Caller) -> Response:
        """In Prometheus' text format."""
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> HTMLResponse:
        """A page to ask and to see what was reused."""
        text = files("blocktune.server").joinpath("page.html").read_text(encoding="utf-8")
        return HTMLResponse(text, headers={"content-security-policy": POLICY})

    return app


POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; frame-ancestors 'none'; base-uri 'none'"
)


def _add_errors(app: FastAPI) -> None:
    """Every error in OpenAI's form, in one line."""

    def reply(status: int, message: str, param: str | None = None, **headers: str) -> JSONResponse:
        return JSONResponse(error_body(message, status, param), status, headers=headers or None)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"][1:])[:200]
        place = place.encode(errors="replace").decode()
        return reply(400, f"{place}: {first['msg']}" if place else first["msg"], place or None)

    @app.exception_handler(StarletteHTTPException)
    async def refused(request: Request, error: StarletteHTTPException) -> JSONResponse:
        return reply(error.status_code, str(error.detail), **(error.headers or {}))

    @app.exception_handler(UnknownModel)
    async def unknown(request: Request, error: UnknownModel) -> JSONResponse:
        return reply(404, str(error), "model")

    @app.exception_handler(Busy)
    async def busy(request: Request, error: Busy) -> JSONResponse:
        return reply(429, str(error), **{"Retry-After": str(max(1, round(error.retry_after)))})


class Exchange:
    """One request with its job: passes events on, and cancels the job when the client leaves."""

    def __init__(
        self,
        service: Service,
        asked: Asked,
        tenant: Tenant,
        request: Request,
        leave: Callable[[], None],
    ):
        self.service, self.asked, self.tenant, self.request = service, asked, tenant, request
        self.id = uuid.uuid4().hex[:24]
        self.created = int(time.time())
        self._leave: Callable[[], None] | None = leave
        self._queue: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def emit(event: Event) -> None:
            try:
                loop.call_soon_threadsafe(self._queue.put_nowait, event)
            except RuntimeError:  # the loop is closed: nobody waits
                asked.job.cancel()

        asked.job.emit = emit

    def submit(self) -> None:
        """Queues the job.

        Raises:
            Busy: If too many wait.
            HTTPException: If it would never fit.
        """
        try:
            self.service.scheduler.submit(self.asked.job)
        except ValueError as error:
            raise HTTPException(400, str(error)) from None

    def close(self) -> None:
        """Ends the exchange; what of the job is not done is not done any more."""
        self.asked.job.cancel()
        leave, self._leave = self._leave, None
        if leave is not None:
            leave()

    async def events(self) -> AsyncIterator[Delta | Report]:
        """The job's events, the report last.

        Raises:
            HTTPException: If it fails, or the client has left (499, which nobody reads).
        """
        watch = asyncio.create_task(self._watch())
        try:
            while True:
                event = await self._queue.get()
                if isinstance(event, Failure):
                    raise HTTPException(event.status, event.message)
                yield event
                if isinstance(event, Report):
                    return
        finally:
            watch.cancel()
            self.close()

    async def _watch(self) -> None:
        """Ends the job when the client leaves."""
        while (await self.request.receive())["type"] != "http.disconnect":
            pass
        self.asked.job.cancel()
        self._queue.put_nowait(Failure(499, "the client has left"))

    async def report(self) -> Report:
        """Waits for the end of a job without an answer."""
        async for event in self.events():
            if isinstance(event, Report):
                return event
        raise AssertionError("a job ended without a report")

    async def respond(self, bodies: Bodies, body: ChatRequest | CompletionRequest) -> Response:
        """The whole answer, or a stream whose first event has come."""
        events = self.events()
        first = await anext(events)
        if body.stream:
            options = body.stream_options
            stream = self._stream(bodies, first, events, bool(options and options.include_usage))
            return StreamingResponse(
                stream, media_type="text/event-stream", headers={"cache-control": "no-cache"}
            )
        bodies.add(first)
        async for event in events:
            bodies.add(event)
            if isinstance(event, Report):
                self._log(event, bodies)
                return JSONResponse(bodies.whole(event))
        raise AssertionError("an answer ended without a report")

    async def _stream(
        self, bodies: Bodies, first: Event, events: AsyncIterator[Event], with_usage: bool
    ) -> AsyncIterator[bytes]:
        """Server-sent events, as OpenAI sends them."""
        try:
            yield _sse(*bodies.opening())
            yield _sse(*bodies.delta(first))
            async for event in events:
                if isinstance(event, Delta):
                    yield _sse(*bodies.delta(event))
                else:
                    self._log(event, bodies)
                    if with_usage:
                        yield _sse(bodies.closing(event))
            yield b"data: [DONE]\n\n"
        except HTTPException as error:
            yield _sse(error_body(str(error.detail), error.status_code))
        finally:
            self.close()

    def _log(self, report: Report, bodies: Bodies) -> None:
        job, usage = self.asked.job, report.usage
        total_s = time.perf_counter() - job.created
        name = job.method.name
        self.service.metrics.book((self.asked.served.name, name, self.tenant.name), report, total_s)
        _LOG.info(
            "%s tenant=%s model=%s method=%r prompt=%d cached=%d answer=%d queue=%.4fs "
            "ttft=%.4fs total=%.4fs%s",
            *(self.id, self.tenant.name, self.asked.served.name, name),
            *(usage.prompt_tokens, report.cached_tokens, report.answer_tokens),
            *(report.queue_s, report.ttft_s, total_s),
            f" text={bodies.texts}" if self.service.config.log_texts else "",
        )

    def chunk_list(self, report: Report) -> ChunkList:
        """What `POST /v1/chunks` answers."""
        chunks = self._chunks(report, self.asked.job.wanted)
        data = [
            ChunkStatus(**{k: one[k] for k in ("key", "id", "tokens", "cached")}, encoded=encoded)
            for one in chunks
            for encoded in [one["cached"] == "none"]
        ]
        return ChunkList(data=data, encode_s=report.encode_s)

    def _chunks(self, report: Report, pieces: Any) -> list[dict[str, Any]]:
        """Per document its id, size, key and where it was found."""
        count = len(self.asked.sources)
        pieces = list(pieces)[-count:] if len(pieces) >= count else []  # [] if none was looked up
        tiers, encoder = dict(report.tiers), self.asked.job.engine.state.encoder
        return [
            {
                "index": index,
                "id": source.id,
                "title": source.chunk.title,
                "tokens": len(piece.ids),
                "cached": tiers.get(piece, "none"),
                "key": self.tenant.sign(encoder.key(piece)),
            }
            for index, (source, piece) in enumerate(zip(self.asked.sources, pieces, strict=False))
        ]

    def extension(self, report: Report) -> dict[str, Any]:
        """The ``blocktune`` field of an answer."""
        usage = usage_fields(report.usage)
        ttft = usage.pop("ttft") | {"queue_s": report.queue_s, "total_s": report.ttft_s}
        chunks = self._chunks(report, self.pieces())
        for index, source in enumerate(self.asked.sources if not chunks else ()):
            chunks.append({"index": index, "id": source.id, "title": source.chunk.title})
        made = {"method": self.asked.job.method.name, "chunks": chunks, "usage": usage}
        made["ttft"] = ttft
        return made | ({} if report.strip is None else {"strip": report.strip})

    def pieces(self) -> list[Any]:
        """What was looked up for the prompt: its prefix and its chunks, in order."""
        return self.asked.job.looked_up


def _sse(*bodies: dict[str, Any]) -> bytes:
    return b"".join(b"data: " + json.dumps(body).encode() + b"\n\n" for body in bodies)


class Bodies:
    """Response bodies of one route. ``texts`` are the answers so far."""

    prefix = object_name = chunk_name = ""

    def __init__(self, exchange: Exchange):
        self.exchange = exchange
        job = exchange.asked.job
        self.texts = [""] * job.settings.choices
        self.finish: list[str | None] = [None] * job.settings.choices
        self.logprobs: list[list[TokenLogprob]] = [[] for _ in self.texts]
        self.tokenizer = job.engine.tokenizer
        self.wants_logprobs = job.settings.logprobs is not None

    def add(self, event: Event) -> None:
        """Takes a delta in."""
        if isinstance(event, Delta):
            self.texts[event.index] += event.text
            self.finish[event.index] = event.finish
            if event.logprob is not None:
                self.logprobs[event.index].append(event.logprob)

    def whole(self, report: Report) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        choices = [
            {
                "index": index,
                **self.message(text),
                "logprobs": self.shown(self.logprobs[index], 0) if self.wants_logprobs else None,
                "finish_reason": self.finish[index],
            }
            for index, text in enumerate(self.texts)
        ]
        return self._frame(self.object_name, choices) | self._counts(report)

    def opening(self) -> list[dict[str, Any]]:
        """What a stream begins with."""
        return []

    def delta(self, event: Event) -> list[dict[str, Any]]:
        """The bodies of one event of a stream."""
        assert isinstance(event, Delta)
        before = len(self.texts[event.index])
        self.add(event)
        if not event.text and event.finish is None and event.logprob is None:
            return []  # part of a character, or the beginning of a stop text
        logs = None if event.logprob is None else self.shown([event.logprob], before)
        choice = {
            "index": event.index,
            **self.piece(event.text),
            "logprobs": logs,
            "finish_reason": event.finish,
        }
        return [self._frame(self.chunk_name, [choice])]

    def closing(self, report: Report) -> dict[str, Any]:
        """The last chunk of a stream, with the usage."""
        return self._frame(self.chunk_name, []) | self._counts(report)

    def message(self, text: str) -> dict[str, Any]:
        """The text of a whole choice."""
        return {"text": text}

    def piece(self, text: str) -> dict[str, Any]:
        """The text of a streamed one."""
        return {"text": text}

    def shown(self, logs: list[TokenLogprob], offset: int) -> dict[str, Any]:
        """Log probabilities as the route's clients want them; ``offset`` in characters."""
        names = [self.token(one.token) for one in logs]
        offsets = []
        for name in names:
            offsets.append(offset)
            offset += len(name)
        return {
            "tokens": names,
            "token_logprobs": [one.logprob for one in logs],
            "top_logprobs": [{self.token(i): value for i, value in one.top} for one in logs],
            "text_offset": offsets,
        }

    def token(self, index: int) -> str:
        """The text of a token."""
        return self.tokenizer.decode([index])

    def _frame(self, name: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": f"{self.prefix}-{self.exchange.id}",
            "object": name,
            "created": self.exchange.created,
            "model": self.exchange.asked.served.name,
            "choices": choices,
        }

    def _counts(self, report: Report) -> dict[str, Any]:
        usage = usage_body(report.usage.prompt_tokens, report.cached_tokens, report.answer_tokens)
        return {"usage": usage, "blocktune": self.exchange.extension(report)}


class TextBodies(Bodies):
    """Of ``/v1/completions``."""

    prefix, object_name, chunk_name = "cmpl", "text_completion", "text_completion"


class ChatBodies(Bodies):
    """Of ``/v1/chat/completions``."""

    prefix, object_name, chunk_name = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self) -> list[dict[str, Any]]:
        """The role of every choice."""
        return [
            self._frame(
                self.chunk_name,
                [
                    {
                        "index": index,
                        "delta": {"role": "assistant", "content": ""},
                        "logprobs": None,
                        "finish_reason": None,
                    }
                ],
            )
            for index in range(len(self.texts))
        ]

    def message(self, text: str) -> dict[str, Any]:
        """A message of the assistant."""
        return {"message": {"role": "assistant", "content": text}}

    def piece(self, text: str) -> dict[str, Any]:
        """New text of it."""
        return {"delta": {"content": text} if text else {}}

    def shown(self, logs: list[TokenLogprob], offset: int) -> dict[str, Any]:
        """Log probabilities with bytes and alternatives."""

        def entry(index: int, value: float) -> dict[str, Any]:
            text = self.token(index)
            return {"token": text, "logprob": value, "bytes": list(text.encode())}

        return {
            "content": [
                entry(one.token, one.logprob) | {"top_logprobs": [entry(*top) for top in one.top]}
                for one in logs
            ]
        }
