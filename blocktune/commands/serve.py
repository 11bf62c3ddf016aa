"""`blocktune serve`."""

from __future__ import annotations

import socket
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

SAFETY, LIMITS = {"rich_help_panel": "Safety"}, {"rich_help_panel": "Limits"}
LOCAL = ("127.0.0.1", "localhost", "::1", "[::1]")

Adapters = Annotated[
    list[str] | None,
    typer.Option(
        help="Adapter: a folder, a name on the HF Hub or release:NAME; NAME=ADAPTER sets the "
        "name that requests use. Repeatable: they share the weights of their base.",
    ),
]
Name = Annotated[
    str | None,
    typer.Option(
        help="Name that requests use for --model. Default: its own; beside adapters it is "
        "served only under a name."
    ),
]
Method = Annotated[
    str | None,
    typer.Option(
        help="Reuse method of requests that name none. Default: what the adapter was trained "
        "for, or naive."
    ),
]
StoreGb = Annotated[
    float,
    typer.Option(
        min=0.0, help="Memory for encoded chunks, and as much for exact prefixes.", **LIMITS
    ),
]
Host = Annotated[str, typer.Option(help="Address to listen on.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 picks one.")]
ApiKey = Annotated[
    str | None,
    typer.Option(
        envvar="BLOCKTUNE_API_KEY",
        help="Key that requests must send as a bearer token. Default: none.",
        **SAFETY,
    ),
]
Tenants = Annotated[
    Path | None,
    typer.Option(
        help="YAML of tenants: {acme: {key: ..., max_requests: 4, tokens_per_minute: 100000}}. "
        "Tenants share no chunks.",
        **SAFETY,
    ),
]
AllowedHosts = Annotated[
    list[str] | None,
    typer.Option(
        help="Host header to accept; repeatable. Default: this machine's names on a local "
        "address, else all.",
        **SAFETY,
    ),
]
LogTexts = Annotated[bool, typer.Option("--log-texts", help="Log answers.", **SAFETY)]
SkipCheck = Annotated[
    bool, typer.Option("--skip-check", help="Answer without the check that reuse is exact.")
]
LimitPairs = Annotated[
    list[str] | None,
    typer.Option(
        help="name=value of a limit: body_bytes, body_s, chunks, prompt_tokens, new_tokens, "
        "default_new_tokens, choices, request_s, queue, running, kv_bytes, pinned_bytes, "
        "prefill_tokens; repeatable.",
        **LIMITS,
    ),
]
DrainS = Annotated[
    int, typer.Option(min=0, help="Seconds to finish requests after SIGTERM.", **LIMITS)
]


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
    adapter: Adapters = None,
    name: Name = None,
    method: Method = None,
    store: Store = None,
    response_cache: Responses = None,
    store_gb: StoreGb = 4.0,
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    device: Device = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    api_key: ApiKey = None,
    tenants: Tenants = None,
    allowed_host: AllowedHosts = None,
    log_texts: LogTexts = False,
    skip_check: SkipCheck = False,
    limit: LimitPairs = None,
    drain_s: DrainS = 120,
) -> None:
    """Serve an OpenAI-compatible API with cached chunks, and a page to try it."""
    import fastapi  # noqa: F401  # one line if the extra is missing, before a model is loaded
    import prometheus_client  # noqa: F401
    import uvicorn

    from blocktune.server import ServerConfig, Service, Tenant, create_app, launch, load_tenants

    if api_key is not None and tenants is not None:
        raise ValueError("give --api-key or --tenants, not both")
    known = () if api_key is None else (Tenant(key=api_key),)
    config = ServerConfig(
        limits=launch.read_limits(limit or []),
        tenants=known if tenants is None else load_tenants(tenants),
        hosts=tuple(allowed_host or (LOCAL if host in LOCAL else ("*",))),
        log_texts=log_texts,
    )
    if host not in LOCAL and not config.tenants:
        typer.echo(f"note: everybody who reaches {host}:{port} may ask; set --api-key", err=True)
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:  # before a model is loaded
            probe.bind((host, port))
        except OSError as error:
            reason = f"{error.strerror}; choose another --host or --port"
            raise ValueError(f"cannot listen on {host}:{port}: {reason}") from None
    quiet_libraries()
    engines = launch.load_engines(
        *(model, adapter or [], name, store, int(store_gb * 2**30)),
        **{"dtype": dtype, "device": device, "quantize": quantize},
    )
    kept = responses(response_cache, next(iter(engines.values())).store)
    service = Service(engines, config, method, not skip_check, kept)
    uvicorn.run(
        create_app(service), host=host, port=port, **launch.uvicorn_options(config, drain_s)
    )
