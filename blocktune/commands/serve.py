"""`blocktune serve` and `blocktune vllm serve`: cached chunks over HTTP."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from blocktune.commands import options as opt
from blocktune.commands.application import command, new_group

SAFETY, LIMITS = {"rich_help_panel": "Safety"}, {"rich_help_panel": "Limits"}
LOCAL = ("127.0.0.1", "localhost", "::1", "[::1]")

Adapters = Annotated[
    list[str] | None,
    Option(
        help="Adapter: a folder, a name on the HF Hub or release:NAME; NAME=ADAPTER sets the "
        "name that requests use. Repeatable: they share the weights of their base.",
    ),
]
Name = Annotated[
    str | None,
    Option(
        help="Name that requests use for --model. Default: its own; beside adapters it is "
        "served only under a name."
    ),
]
Method = Annotated[
    str | None,
    Option(
        help="Reuse method of requests that name none. Default: what the adapter was trained "
        "for, or naive."
    ),
]
StoreGb = Annotated[
    float,
    Option(min=0.0, help="Memory for encoded chunks, and as much for exact prefixes.", **LIMITS),
]
Host = Annotated[str, Option(help="Address to listen on.")]
Port = Annotated[int, Option(min=0, max=65535, help="Port; 0 picks one.")]
ApiKey = Annotated[
    str | None,
    Option(
        envvar="BLOCKTUNE_API_KEY",
        help="Key that requests must send as a bearer token. Default: none.",
        **SAFETY,
    ),
]
Tenants = Annotated[
    Path | None,
    Option(
        help="YAML of tenants: {acme: {key: ..., max_requests: 4, tokens_per_minute: 100000}}. "
        "Tenants share no chunks.",
        **SAFETY,
    ),
]
AllowedHosts = Annotated[
    list[str] | None,
    Option(
        help="Host header to accept; repeatable. Default: this machine's names on a local "
        "address, else all.",
        **SAFETY,
    ),
]
LogTexts = Annotated[bool, Option("--log-texts", help="Log answers.", **SAFETY)]
SkipCheck = Annotated[
    bool, Option("--skip-check", help="Answer without the check that reuse is exact.")
]
LimitPairs = Annotated[
    list[str] | None,
    Option(
        help="name=value of a limit: body_bytes, body_s, chunks, prompt_tokens, new_tokens, "
        "default_new_tokens, choices, request_s, queue, running, kv_bytes, pinned_bytes, "
        "prefill_tokens; repeatable.",
        **LIMITS,
    ),
]
DrainS = Annotated[int, Option(min=0, help="Seconds to finish requests after SIGTERM.", **LIMITS)]


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
    model: opt.Model = None,
    adapter: Adapters = None,
    name: Name = None,
    method: Method = None,
    store: opt.Store = None,
    response_cache: opt.Responses = None,
    store_gb: StoreGb = 4.0,
    dtype: opt.Dtype = "auto",
    quantize: opt.Quantize = None,
    device: opt.Device = None,
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
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:  # before a model is loaded
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        reason = f"{os.strerror(error.errno)}; choose another --host or --port"
        raise ValueError(f"cannot listen on {host}:{port}: {reason}") from None
    opt.quiet_libraries()
    engines = launch.load_engines(
        *(model, adapter or [], name, store, int(store_gb * 2**30)),
        **{"dtype": dtype, "device": device, "quantize": quantize},
    )
    kept = opt.responses(response_cache, next(iter(engines.values())).store)
    service = Service(engines, config, method, not skip_check, kept)
    uvicorn.run(
        create_app(service), host=host, port=port, **launch.uvicorn_options(config, drain_s)
    )


group = new_group("vllm", "Serve cached chunks from vLLM.")


@group.callback()
def _root() -> None:
    """Keeps `serve` a subcommand while it is the only one."""


@command(
    "serve",
    "blocktune encode -m data/tiny --input docs.jsonl --store chunks/",
    "blocktune vllm serve data/tiny --store chunks/ --port 8000",
    "blocktune vllm serve M --store chunks/ --adapter legal=out/legal --adapter news=out/news",
    "blocktune vllm serve M --store chunks/ --tensor-parallel-size 4 --max-model-len 32768",
    "All other options are vLLM's. Point an OpenAI client at http://127.0.0.1:8000/v1",
    of=group,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def serve_vllm(
    context: typer.Context,
    model: Annotated[str, Argument(help="Base model, as vLLM takes it.")],
    store: Annotated[str, Option(help="Encoded chunks: a folder or URL, as of `answer --store`.")],
    adapter: Annotated[
        list[str] | None,
        Option(
            help="Adapter that chunks were encoded with: a folder or a name on the HF Hub; "
            "NAME=ADAPTER sets the name that requests use. Repeatable."
        ),
    ] = None,
    encode_wait: Annotated[
        float,
        Option(min=0, help="Seconds that a request waits for `blocktune encode --follow`."),
    ] = 30.0,
    host_gb: Annotated[float, Option(min=0, help="Memory for hot chunks, in each rank.")] = 1.0,
    fingerprint: Annotated[
        str | None, Option(help="Of the base's chunks, if the store has several that fit.")
    ] = None,
) -> None:
    """Start vLLM's server with cached chunks, and chat completions over `documents`."""
    from blocktune.vllm import launch

    parts = [text.partition("=") for text in adapter or ()]
    named = {name if tail else Path(name).name: tail or name for name, _, tail in parts}
    extra = {"encode_wait_s": encode_wait, "host_gb": host_gb, "fingerprint": fingerprint}
    launch.serve(model, named, store, context.args, **extra)
