"""`blocktune serve`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from blocktune.commands import command
from blocktune.commands.options import (
    Device,
    Dtype,
    Model,
    Quantize,
    Store,
    load_engine,
)

if TYPE_CHECKING:
    from blocktune.engine import Engine

SAFETY, LIMITS = "Safety", "Limits"
LOCAL = ("127.0.0.1", "localhost", "::1", "[::1]")


@command(
    "serve",
    "blocktune serve --model data/tiny",
    "blocktune serve -m M --adapter out/kvlink --store cache/ --port 8080",
    "blocktune serve -m M --adapter legal=out/legal --adapter news=out/news",
    "blocktune serve -m M --host 0.0.0.0 --tenants tenants.yaml",
    "Then open http://127.0.0.1:8000, or point an OpenAI client at",
    "    http://127.0.0.1:8000/v1",
)
def serve(
    model: Model = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            help="Adapter: a folder, a name on the HF Hub or release:NAME; NAME=ADAPTER sets the "
            "name that requests use. Repeatable: each holds weights of its own.",
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name that requests use for --model. Default: its own.")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="Reuse method of requests that name none. Default: what the adapter was trained "
            "for, or naive."
        ),
    ] = None,
    store: Store = None,
    store_gb: Annotated[
        float, typer.Option(min=0.0, help="Memory for encoded chunks.", rich_help_panel=LIMITS)
    ] = 4.0,
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    device: Device = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 picks one.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="BLOCKTUNE_API_KEY",
            help="Key that requests must send as a bearer token. Default: none.",
            rich_help_panel=SAFETY,
        ),
    ] = None,
    tenants: Annotated[
        Path | None,
        typer.Option(
            help="YAML of tenants: {acme: {key: ..., max_requests: 4, tokens_per_minute: 100000}}. "
            "Tenants share no chunks.",
            rich_help_panel=SAFETY,
        ),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            help="Host header to accept; repeatable. Default: this machine's names on a local "
            "address, else all.",
            rich_help_panel=SAFETY,
        ),
    ] = None,
    log_texts: Annotated[
        bool, typer.Option("--log-texts", help="Log answers.", rich_help_panel=SAFETY)
    ] = False,
    skip_check: Annotated[
        bool,
        typer.Option("--skip-check", help="Answer without the check that reuse is exact."),
    ] = False,
    limit: Annotated[
        list[str] | None,
        typer.Option(
            help="name=value of a limit: body_bytes, body_s, chunks, prompt_tokens, new_tokens, "
            "default_new_tokens, choices, request_s, queue, running, kv_bytes, prefill_tokens; "
            "repeatable.",
            rich_help_panel=LIMITS,
        ),
    ] = None,
    drain_s: Annotated[
        int,
        typer.Option(
            min=0, help="Seconds to finish requests after SIGTERM.", rich_help_panel=LIMITS
        ),
    ] = 120,
) -> None:
    """Serve an OpenAI-compatible API with cached chunks, and a page to try it."""
    import fastapi  # noqa: F401  # one line if the extra is missing, before a model is loaded
    import prometheus_client  # noqa: F401
    import uvicorn

    from blocktune.server import ServerConfig, Service, Tenant, create_app, load_tenants

    if api_key is not None and tenants is not None:
        raise ValueError("give --api-key or --tenants, not both")
    known = () if api_key is None else (Tenant(key=api_key),)
    hosts = tuple(allowed_host or (LOCAL if host in LOCAL else ("*",)))
    config = ServerConfig(
        limits=read_limits(limit or []),
        tenants=known if tenants is None else load_tenants(tenants),
        hosts=hosts,
        log_texts=log_texts,
    )
    if host not in LOCAL and not config.tenants:
        typer.echo(f"note: everybody who reaches {host}:{port} may ask; set --api-key", err=True)
    engines = load_engines(
        model, adapter or [], name, store, int(store_gb * 2**30), dtype, device, quantize
    )
    service = Service(engines, config, method, checked=not skip_check)
    set_up_logs()
    uvicorn.run(
        create_app(service),
        host=host,
        port=port,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=drain_s,
    )


def load_engines(
    model: str | None,
    adapters: list[str],
    name: str | None,
    store: Path | None,
    store_bytes: int,
    *how: Any,
) -> dict[str, Engine]:
    """An engine for each adapter, or one for the bare model; they share a store.

    Raises:
        ValueError: If two have the same name.
    """
    from blocktune.cache import ChunkStore

    engines: dict[str, Engine] = {}
    kept = ChunkStore(store_bytes, folder=store) if store_bytes or store else None
    for text in adapters or [None]:
        label, equals, adapter = (text or "").partition("=")
        adapter = adapter if equals else text
        source = adapter or model
        label = label if equals else name if name and not adapter else _short(source or "")
        if label in engines:
            raise ValueError(f"two models are called '{label}'; write --adapter NAME=ADAPTER")
        engines[label] = load_engine(model, adapter, kept, *how)
        if kept is not None:
            kept.device = engines[label].model.device
    return engines


def _short(source: str) -> str:
    """A folder's name; other names as they are."""
    return Path(source).resolve().name if Path(source).exists() else source


def read_limits(pairs: list[str]) -> Any:
    """Limits from ``name=value`` pairs.

    Raises:
        ValueError: If one is not a pair, or its name or value is wrong.
    """
    from dataclasses import fields

    from blocktune.server import Limits

    known = {f.name: type(f.default) for f in fields(Limits)}
    values = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or key not in known:
            raise ValueError(f"--limit must be name=value of {', '.join(known)}; got '{pair}'")
        try:
            values[key] = known[key](value)
        except ValueError:
            raise ValueError(f"--limit {key}: a number is wanted, got '{value}'") from None
    return Limits(**values)


def set_up_logs() -> None:
    """One line a request on standard error."""
    import logging

    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for name in ("blocktune.server", "uvicorn.error"):
        logging.getLogger(name).setLevel(logging.INFO)
