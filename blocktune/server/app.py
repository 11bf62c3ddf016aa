"""The routes: OpenAI's interface, chunks, the demo page, health and metrics."""

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException

import blocktune
from blocktune.server.bodies import ChatBodies, TextBodies, chunk_list
from blocktune.server.config import Tenant
from blocktune.server.exchange import authorized, begin
from blocktune.server.middleware import Guard, error_body
from blocktune.server.schemas import ChatRequest, ChunksRequest, CompletionRequest, WrongField
from blocktune.server.service import Service

KEY = re.compile(r"[0-9a-f]{64}(-[0-9a-f]{16})?")
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; frame-ancestors 'none'; base-uri 'none'"
)


def create_app(service: Service) -> FastAPI:
    """The application around a `Service`; its scheduler runs while the application does."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.scheduler.start()
        yield
        await asyncio.to_thread(service.stop)

    app = FastAPI(
        title="blocktune",
        version=blocktune.__version__,
        lifespan=lifespan,
        exception_handlers={WrongField: _invalid, HTTPException: _refused},
    )
    app.router.redirect_slashes = False
    app.state.service = service
    app.add_middleware(Guard, config=service.config, metrics=service.metrics)
    for router in (work, tenants, public):
        app.include_router(router)
    kinds = [(kind, "validation") for kind in (ChatRequest, CompletionRequest, ChunksRequest)]
    bodies = models_json_schema(kinds, ref_template="#/components/schemas/{model}")[1]["$defs"]
    app.openapi()["components"]["schemas"] |= bodies  # FastAPI keeps what it returns
    return app


async def _invalid(request: Request, error: WrongField) -> JSONResponse:
    return JSONResponse(error_body(str(error), error.status, error.param, error.code), error.status)


async def _refused(request: Request, error: HTTPException) -> JSONResponse:
    text, status = str(error.detail), error.status_code
    if text in ("Not Found", "Method Not Allowed"):  # Starlette's
        path = request.scope["raw_path"].decode("latin-1")
        text = f"no route {request.method} {path:.80}; see /docs. OpenAI's are under /v1"
    return JSONResponse(error_body(text, status), status, headers=error.headers)


# Dependencies are coroutines: FastAPI runs plain functions in threads.
async def _service(request: Request) -> Service:
    return request.app.state.service


async def _own_key(key: str, tenant: Annotated[Tenant, Depends(authorized)]) -> str:
    """The store key of a signed ``key``; HTTPException if this tenant was not given that name."""
    if KEY.fullmatch(key) and (store_key := tenant.verify(key)):
        return store_key
    raise HTTPException(404, "no such chunk")


Serving = Annotated[Service, Depends(_service)]
OwnKey = Annotated[str, Depends(_own_key)]
tenants = APIRouter(dependencies=[Depends(authorized)])
public = APIRouter()


class _Plain(APIRoute):
    """A route whose request `begin` reads and authorizes: without FastAPI's 0.3 ms per request."""

    def get_route_handler(self) -> Callable[[Request], Awaitable[Response]]:
        return self.endpoint


work = APIRouter(route_class=_Plain)


def _body(kind: type[BaseModel]) -> dict[str, Any]:
    schema = {"$ref": f"#/components/schemas/{kind.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


@work.post("/v1/chat/completions", response_model=None, openapi_extra=_body(ChatRequest))
async def chat(request: Request) -> Response:
    """Answers the user's last message from the documents."""
    exchange, body = await begin(request, ChatRequest, Service.chat)
    return await exchange.respond(ChatBodies, body)


@work.post("/v1/completions", response_model=None, openapi_extra=_body(CompletionRequest))
async def complete(request: Request) -> Response:
    """Continues a text, after documents if there are any."""
    exchange, body = await begin(request, CompletionRequest, Service.completion)
    return await exchange.respond(TextBodies, body)


@work.post("/v1/chunks", response_model=None, openapi_extra=_body(ChunksRequest))
async def encode(request: Request) -> Response:
    """Encodes documents ahead of time, and pins them if requested."""
    exchange, _ = await begin(request, ChunksRequest, Service.encoding)
    *_, report = [event async for event in exchange.events()]
    return JSONResponse(chunk_list(exchange.job, report))


@tenants.get("/v1/models")
async def models(service: Serving) -> dict[str, Any]:
    """The models and adapters that are served."""
    return {"object": "list", "data": [service.card(name) for name in service.models]}


@tenants.get("/v1/models/{name:path}")
async def model(name: str, service: Serving) -> dict[str, Any]:
    """One model or adapter."""
    return service.card(name)


@tenants.get("/v1/chunks/{key}")
async def status(key: str, store_key: OwnKey, service: Serving) -> dict[str, Any]:
    """Whether a chunk is in the store; ``key`` is from ``POST /v1/chunks`` or an answer."""
    return await asyncio.to_thread(service.chunk, key, store_key)


@tenants.delete("/v1/chunks/{key}")
async def delete(key: str, store_key: OwnKey, service: Serving) -> dict[str, Any]:
    """Removes a chunk from memory, folder and remote, pinned or not; 503 if one is out of reach."""
    if not await asyncio.to_thread(service.discard, store_key):
        raise HTTPException(503, "the chunk may still be stored: its store is out of reach")
    return await asyncio.to_thread(service.chunk, key, store_key)


@tenants.get("/v1/methods")
async def methods() -> list[dict[str, Any]]:
    """Reuse methods that requests may name."""
    from blocktune.methods import describe_all

    return [row._asdict() for row in describe_all()]


@tenants.get("/metrics", response_class=Response)
async def metrics(service: Serving) -> Response:
    """Metrics in Prometheus' text format."""
    return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)


@public.get("/health")
async def health(service: Serving) -> Response:
    """Whether the process can answer; if not, it must be restarted."""
    return _state([service.scheduler.fault], "ok")


@public.get("/ready")
async def ready(service: Serving) -> Response:
    """Whether the correctness check has passed and requests are accepted."""
    checked = service.faults or ["" if service.ready else "checking"]
    return _state([service.scheduler.fault, *checked], "ready")


def _state(faults: list[str], well: str) -> Response:
    told = "; ".join(filter(None, faults))
    return JSONResponse(error_body(told, 503), 503) if told else JSONResponse({"status": well})


@public.get("/", response_class=HTMLResponse, include_in_schema=False)
async def page() -> HTMLResponse:
    """A demo page that asks questions and shows what was reused."""
    text = files("blocktune.server").joinpath("page.html").read_text(encoding="utf-8")
    return HTMLResponse(text, headers={"content-security-policy": POLICY})
