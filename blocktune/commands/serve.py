"""`blocktune serve` and `blocktune vllm serve`: cached chunks over HTTP."""

import os
import socket
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument

from blocktune.commands import options as opt
from blocktune.commands.application import command, new_group
from blocktune.commands.options import option
from blocktune.parsing import load_yaml, mapping, refuse_doubles, split_name

SAFETY, LIMITS = "Safety", "Limits"  # panels of the help
KEY_VARIABLE = "BLOCKTUNE_API_KEY"
LOCAL = ("127.0.0.1", "localhost", "::1", "[::1]")
OURS = ("--model", "--revision", "--tokenizer", "--chat-template", "--kv-transfer-config")
OURS += ("--kv-offloading-size", "--default-chat-template-kwargs")
"""Options that requests with documents would not follow; vLLM takes their starts, and NAME.KEY."""

ADAPTER = "Adapter, as in `answer`; NAME=ADAPTER sets the name that requests use. Repeatable."
NAME = "Name of --model in requests (default: its own). With adapters: serve the base, too."
GB = {"min": 0, "max": 1 << 20}  # a petabyte; infinity is no number of bytes
StoreGb = option(float, "GiB of memory for chunks, and again for prefixes.", panel=LIMITS, **GB)
ApiKey = option(str | None, "Bearer token of all requests.", panel=SAFETY, envvar=KEY_VARIABLE)
TENANTS = "YAML of tenants: {acme: {key: ..., max_requests: 4, tokens_per_minute: 100000}}."
HOSTS = "Host header to accept; repeatable. Default: localhost if --host is local, else any."
LimitPairs = option(
    list[str] | None,
    "Limit as name=value; repeatable. Names: body_bytes, body_s, chunks, prompt_tokens, "
    "new_tokens, default_new_tokens, choices, request_s, queue, running, kv_bytes, "
    "pinned_bytes, prefill_tokens; see docs/serving.md.",
    panel=LIMITS,
)


@command(
    "blocktune serve --model data/tiny",
    "blocktune serve -m M --adapter out/kvlink --store cache/ --port 8080",
    "blocktune serve -m M --adapter legal=out/legal --adapter news=out/news",
    "blocktune serve -m M --host 0.0.0.0 --tenants tenants.yaml",
    "Then open http://127.0.0.1:8000, or point an OpenAI client at",
    "    http://127.0.0.1:8000/v1",
)
def serve(
    model: opt.Model = None,
    adapter: option(list[str] | None, ADAPTER) = None,
    name: option(str | None, NAME) = None,
    method: option(str | None, "For requests that name none. Default: as `answer`.") = None,
    store: opt.Store = None,
    response_cache: opt.Responses = None,
    store_gb: StoreGb = 4.0,
    dtype: opt.Dtype = "auto",
    quantize: opt.Quantize = None,
    device: opt.Device = None,
    host: option(str, "Address to listen on.") = "127.0.0.1",
    port: option(int, "Port to listen on; 0 picks a free one.", min=0, max=65535) = 8000,
    api_key: ApiKey = None,
    tenants: option(Path | None, TENANTS, panel=SAFETY) = None,
    allowed_host: option(list[str] | None, HOSTS, panel=SAFETY) = None,
    log_texts: option(bool, "Log the text of answers.", "--log-texts", panel=SAFETY) = False,
    skip_check: option(bool, "Start without checking that reuse is exact.", "--skip-check") = False,
    limit: LimitPairs = None,
    drain_s: option(int, "Seconds to finish requests after SIGTERM.", panel=LIMITS, min=0) = 120,
) -> None:
    """Serve an OpenAI-compatible API with cached chunks, and a web page to try it."""
    import fastapi  # noqa: F401  # reports a missing extra before a model is loaded
    import prometheus_client  # noqa: F401
    import uvicorn

    from blocktune.cache.responses import ResponseCache, read_settings
    from blocktune.server import ServerConfig, Service, create_app, load_tenants
    from blocktune.server.config import OnlyTenant, read_limits
    from blocktune.server.middleware import uvicorn_options
    from blocktune.server.service import load_engines

    if api_key is not None and tenants is not None:
        raise ValueError("give --api-key or --tenants, not both")
    if api_key is None and tenants is None and os.environ.get(KEY_VARIABLE) == "":
        raise ValueError(f"{KEY_VARIABLE} is set but empty: unset it to serve without a key")
    clients = () if api_key is None else (OnlyTenant(key=api_key),)
    clients = clients if tenants is None else load_tenants(tenants)
    hosts = tuple(allowed_host or (LOCAL if host in LOCAL else ("*",)))
    config = ServerConfig(read_limits(limit or []), clients, hosts, log_texts)
    if host not in LOCAL and not config.tenants:
        typer.echo(f"note: anyone who reaches {host}:{port} can use it; set --api-key", err=True)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:  # before a model is loaded
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        reason = str(error.strerror).partition(" (while")[0]  # Python adds the address there
        hint = "choose another --host or --port"
        raise ValueError(f"cannot listen on {host}:{port}: {reason}; {hint}") from None
    if response_cache is not None:
        read_settings(response_cache)
    opt.quiet_libraries()
    loading = {"dtype": dtype, "device": device, "quantize": quantize}
    size = int(store_gb * 2**30)
    engines = load_engines(model, adapter or [], name, store, size, **loading)
    shared = next(iter(engines.values())).store
    responses = response_cache and ResponseCache.parse(response_cache, shared)
    served = create_app(Service(engines, config, method, not skip_check, responses))
    uvicorn.run(served, host=host, port=port, **uvicorn_options(config, drain_s))


vllm_command = new_group(
    "vllm",
    "Serve cached chunks from vLLM, in an environment of its own (docs/vllm.md).",
    "blocktune vllm serve M --store S",
)


@vllm_command(
    "blocktune encode -m data/tiny --input docs.jsonl --store chunks/",
    "blocktune vllm serve data/tiny --store chunks/ --port 8000",
    "blocktune vllm serve M --store chunks/ --adapter legal=out/legal --adapter news=out/news",
    "blocktune vllm serve M --store chunks/ --tensor-parallel-size 4 --max-model-len 32768",
    "All other options are vLLM's. Point an OpenAI client at http://127.0.0.1:8000/v1",
    context_settings=opt.PASS_ON,
    name="serve",
)
def serve_vllm(
    context: typer.Context,
    model: Annotated[str, Argument(help="Base model, as in `vllm serve`, or NAME@REVISION.")],
    store: option(str, "Store of encoded chunks: a folder or URL, see `answer`."),
    adapter: option(list[str] | None, ADAPTER) = None,
    encode_wait: option(float, "Seconds to wait for `encode --follow`.", min=0) = 30.0,
    host_gb: option(float, "GiB of memory for chunks, in each rank.", **GB) = 1.0,
    fingerprint: option(str | None, "Which chunks to use, if several fit the base.") = None,
) -> None:
    """Start vLLM's server with cached chunks for chat completions with `documents`."""
    from blocktune.vllm import launch

    names = [text.partition("=")[0] for text in context.args if text.startswith("--")]
    if "--config" in context.args[:-1]:  # its file has more options
        path = context.args[context.args.index("--config") + 1]
        names += [f"--{key}" for key in mapping(load_yaml(path, "--config", "create it"), path)]
    for name in (name.replace("_", "-") for name in names):
        if any(one.startswith(name.partition(".")[0]) for one in OURS):
            raise ValueError(f"leave out {name}: blocktune sets model, wording and KV connector")
    named = [(name or Path(path).name, path) for name, path in map(split_name, adapter or ())]
    refuse_doubles("model or adapter", [model, *(n for n, _ in named)], "name it: NAME=ADAPTER")
    extra = {"encode_wait_s": encode_wait, "host_gb": host_gb, "fingerprint": fingerprint}
    launch.serve(model, dict(named), store, context.args, **extra)
