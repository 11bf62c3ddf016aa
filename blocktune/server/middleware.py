"""Around all routes: limits on the size and time of a request's body, and Prometheus metrics."""

import asyncio
import gc
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from blocktune.server.config import ServerConfig
from blocktune.server.scheduler import Report, Scheduler

_LOG = logging.getLogger("blocktune.server")
TTFT = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
SHUT_DOWN = "the server has shut down before the answer was done"
KEEP_ALIVE_S = 75  # before an idle connection is closed: longer than proxies keep theirs
AT_ONCE = 16  # bodies of the largest size that may arrive at once, or as many bytes of smaller


class Metrics:
    """Counters of one server, named as vLLM's after the prefix, so that its dashboards fit."""

    def __init__(self, scheduler: Scheduler):
        self.registry = CollectorRegistry()

        def of(kind: type, name: str, text: str, *labels: str, **more: Any):
            return kind(f"blocktune_{name}", text, labels, registry=self.registry, **more)

        running = of(Gauge, "num_requests_running", "Answers that are decoded or prepared.")
        # A request whose first token is written is in both for a moment.
        unwritten = lambda: sum(not job.choices for job in tuple(scheduler.preparing))  # noqa: E731
        running.set_function(lambda: len(scheduler.running) + unwritten())
        waiting = of(Gauge, "num_requests_waiting", "Requests in the queue.")
        waiting.set_function(lambda: scheduler.waiting)
        held = of(Gauge, "kv_bytes", "Keys and values reserved for answers.")
        held.set_function(lambda: scheduler.kv_bytes)
        self.responses = of(Counter, "http_responses", "Responses by status.", "status")
        self.requests = of(Counter, "requests", "Requests answered.", "model", "method", "tenant")
        self.prompt = of(Counter, "prompt_tokens", "Prompt tokens.", "source")
        self.generated = of(Counter, "generation_tokens", "Answer tokens.")
        self.queries = of(Counter, "chunk_cache_queries", "Chunks looked up.")
        self.hits = of(Counter, "chunk_cache_hits", "Chunks found.", "tier")
        times = partial(of, Histogram, buckets=TTFT)
        self.ttft = times("time_to_first_token_seconds", "From arrival to token.")
        self.between = times("inter_token_latency_seconds", "Between two tokens.")
        self.whole = times("e2e_request_latency_seconds", "From arrival to the end.")

    def record(self, labels: tuple[str, str, str], report: Report, total_s: float) -> None:
        """Counts one answered request; ``labels`` are model, method and tenant."""
        self.requests.labels(*labels).inc()
        self.prompt.labels("cache").inc(report.cached_tokens)
        self.prompt.labels("computed").inc(report.usage.prompt_tokens - report.cached_tokens)
        self.generated.inc(report.answer_tokens)
        self.queries.inc(len(report.tiers))
        for tier in report.tiers.values():
            if tier != "none":
                self.hits.labels(tier).inc()
        self.ttft.observe(report.ttft_s)
        self.whole.observe(total_s)
        if report.steps > 1:
            self.between.observe((total_s - report.ttft_s) / (report.steps - 1))


class Guard:
    """ASGI middleware: reads a request's body within the limits; counts and logs responses."""

    def __init__(self, app: Callable, *, config: ServerConfig, metrics: Metrics):
        self.app, self.config, self.metrics = app, config, metrics
        self.max_bytes, self.max_s = config.limits.body_bytes, config.limits.body_s
        self.held = 0  # bytes of bodies that are still arriving

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        sent = False

        async def counted(message: dict) -> None:
            nonlocal sent
            if message["type"] == "http.response.start":
                sent, status = True, message["status"]
                self.metrics.responses.labels(str(status)).inc()
                if status >= 400:
                    client, path = scope["client"] or ["-"], scope["raw_path"].decode("latin-1")
                    _LOG.info("%s %s %.80s status=%d", client[0], scope["method"], path, status)
            await send(message)

        async def refuse(status: int, message: str) -> None:
            response = JSONResponse(error_body(message, status), status, {"connection": "close"})
            await response(scope, receive, counted)

        host = Headers(scope=scope).get("host", "")
        try:
            if not self.config.accepts(host):
                raise HTTPException(400, f"Host '{host:.80}' is not served; see --allowed-host")
            body = await asyncio.wait_for(self._read(receive), self.max_s)
        except TimeoutError:
            return await refuse(408, f"the body did not arrive within {self.max_s:g} s")
        except HTTPException as error:
            return await refuse(error.status_code, error.detail)
        except ClientDisconnect:
            return None
        pending = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> dict:
            return pending.pop() if pending else await receive()

        # Every GET route answers HEAD too; uvicorn leaves out the body.
        inner = scope | {"method": "GET"} if scope["method"] == "HEAD" else scope
        try:
            await self.app(inner, replay, counted)
        except asyncio.CancelledError:  # the time to finish after SIGTERM is over
            if not sent:
                await refuse(503, SHUT_DOWN)
        except Exception:
            if not sent:
                await refuse(500, "internal error; the server's log says more")
            raise

    async def _read(self, receive: Callable) -> bytes:
        body = bytearray()
        try:
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                part = message.get("body", b"")
                body += part
                self.held += len(part)
                if len(body) > self.max_bytes:
                    raise HTTPException(413, f"the body is larger than {self.max_bytes:,} bytes")
                if not message.get("more_body"):
                    return bytes(body)
                if self.held > AT_ONCE * self.max_bytes:
                    raise HTTPException(429, "too many bodies are coming at once; try again later")
        finally:
            self.held -= len(body)


def with_timeout(seconds: float) -> type[AutoHTTPProtocol]:
    """Uvicorn's protocol, extended to close connections that send no whole header in time."""

    class TimedProtocol(AutoHTTPProtocol):
        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            self._last: object = None
            self._timer = self.loop.call_later(seconds, self._look)

        def connection_lost(self, exc: Exception | None) -> None:
            self._timer.cancel()
            super().connection_lost(exc)

        def _look(self) -> None:
            """Closes if no whole header came since the last check; idle ones end by uvicorn."""
            waits = self.cycle is None or self.cycle.response_complete
            if waits and self.cycle is self._last and self.timeout_keep_alive_task is None:
                self.transport.close()
                return
            self._last = self.cycle
            self._timer = self.loop.call_later(seconds, self._look)

    return TimedProtocol


def uvicorn_options(config: ServerConfig, drain_s: int) -> dict[str, Any]:
    """Options of uvicorn; also sets up the log, one line per request on standard error."""
    gc.collect()
    gc.freeze()  # later collections, which would take longer than a request, skip what is here now
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for name in ("blocktune.server", "uvicorn.error"):
        logging.getLogger(name).setLevel(logging.INFO)
    return {
        "http": with_timeout(config.limits.body_s),
        "log_config": None,
        "access_log": False,
        "server_header": False,
        "timeout_keep_alive": KEEP_ALIVE_S,
        "timeout_graceful_shutdown": drain_s,
    }


KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
CODES = {401: "invalid_api_key", 429: "rate_limit_exceeded"}


def error_body(
    message: str, status: int, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """An error in OpenAI's format; unpaired surrogates become question marks."""
    kind = KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    text, code = message.encode(errors="replace").decode(), code or CODES.get(status)
    return {"error": {"message": text, "type": kind, "param": param, "code": code}}
