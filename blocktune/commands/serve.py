"""`blocktune serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from blocktune.commands import command
from blocktune.commands.options import (
    Device,
    Dtype,
    Model,
    Quantize,
    Responses,
    Store,
    quiet_libraries,
    responses,
)

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
            "name that requests use. Repeatable: they share the weights of their base.",
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(
            help="Name that requests use for --model. Default: its own; beside adapters it is "
            "served only under a name."
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="Reuse method of requests that name none. Default: what the adapter was trained "
            "for, or naive."
        ),
    ] = None,
    store: Store = None,
    response_cache: Responses = None,
    store_gb: Annotated[
        float,
        typer.Option(
            min=0.0,
            help="Memory for encoded chunks, and as much for exact prefixes.",
            rich_help_panel=LIMITS,
        ),
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
        bool, typer.Option("--skip-check", help="Answer without the check that reuse is exact.")
    ] = False,
    limit: Annotated[
        list[str] | None,
        typer.Option(
            help="name=value of a limit: body_bytes, body_s, chunks, prompt_tokens, new_tokens, "
            "default_new_tokens, choices, request_s, queue, running, kv_bytes, pinned_bytes, "
            "prefill_tokens; repeatable.",
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

    from blocktune.server import ServerConfig, Service, Tenant, create_app, launch, load_tenants
    from blocktune.server.middleware import hurried

    if api_key is not None and tenants is not None:
        raise ValueError("give --api-key or --tenants, not both")
    known = () if api_key is None else (Tenant(key=api_key),)
    hosts = tuple(allowed_host or (LOCAL if host in LOCAL else ("*",)))
    config = ServerConfig(
        limits=launch.read_limits(limit or []),
        tenants=known if tenants is None else load_tenants(tenants),
        hosts=hosts,
        log_texts=log_texts,
    )
    if host not in LOCAL and not config.tenants:
        typer.echo(f"note: everybody who reaches {host}:{port} may ask; set --api-key", err=True)
    quiet_libraries()
    engines = launch.load_engines(
        *(model, adapter or [], name, store, int(store_gb * 2**30)),
        **{"dtype": dtype, "device": device, "quantize": quantize},
    )
    kept = responses(response_cache, next(iter(engines.values())).store)
    service = Service(engines, config, method, not skip_check, kept)
    launch.set_up_logs()
    uvicorn.run(
        create_app(service),
        host=host,
        port=port,
        http=hurried(config.limits.body_s),
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=drain_s,
    )
