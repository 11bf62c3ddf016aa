"""Runs vLLM's server over a store, for `blocktune vllm serve`."""

from __future__ import annotations

import json
import os
import sys
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any


def serve(
    model: str, adapters: dict[str, str], store: str, options: list[str], **extra: Any
) -> None:
    """Runs vLLM's server, in this process, until it is stopped.

    Args:
        model: As vLLM takes it.
        adapters: Folders or repositories by their names in requests.
        store: The chunks' place, as ``--store``.
        options: vLLM's own options.
        extra: More keys of ``kv_connector_extra_config``.

    Raises ValueError if vLLM would not find blocktune, an adapter cannot be served, or the store
    has no chunks of the default model.
    """
    import_module("vllm.config")  # before torch, since it sets environment variables
    groups = ("vllm.general_plugins", "vllm.endpoint_plugins")
    plugins = {point.name for group in groups for point in entry_points(group=group)}
    if "blocktune" not in plugins:
        raise ValueError(
            "vLLM looks for plug-ins among installed packages, and blocktune is not installed "
            "here; run `pip install .` in its folder"
        )
    from blocktune.vllm.client import lora_rank, open_clients, transfer_config

    base, clients = open_clients(model, adapters, store, extra.get("fingerprint"))
    allowed = os.environ.get("VLLM_PLUGINS")
    names = plugins if allowed is None else {*allowed.split(","), "blocktune"}
    os.environ["VLLM_PLUGINS"] = ",".join(sorted(names))
    if not any(text.startswith(("--kv-cache-memory", "--gpu-memory")) for text in options):
        # On a CPU vLLM would take most of the machine's memory, and fail if it is in use.
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
    first = next(iter(clients.values()), base).fingerprint
    folders = {name: str(client.adapter) for name, client in clients.items()}
    transfer = transfer_config(store, adapters=folders, **extra)
    bare, revision = base.source
    line = [bare, "--enable-prompt-tokens-details", "--kv-transfer-config", json.dumps(transfer)]
    line += ["--revision", revision] if revision else []
    if loras := {name: client.lora for name, client in clients.items() if client.lora}:
        rank = max(lora_rank(folder) for folder in loras.values())
        line += ["--enable-lora", "--max-lora-rank", str(rank)]
    os.environ["VLLM_USE_RUST_FRONTEND"] = "0"  # it has no plug-ins, so it would ignore documents
    command = import_module("vllm.entrypoints.cli.serve")
    parser = command.make_arg_parser(command.FlexibleArgumentParser())
    parser.set_defaults(max_loras=max(1, len(loras)))  # all of them in one batch
    args = parser.parse_args([*line, *options])
    module = import_module("vllm.entrypoints.openai.models.protocol").LoRAModulePath
    own = [module(name, str(folder)) for name, folder in loras.items()]
    args.lora_modules = [*(args.lora_modules or ()), *own]
    print(
        f"chunks of {model} ({first[:12]}) in '{store}'; vLLM starts in about a minute (its log "
        'follows), and is ready at "Application startup complete"',
        file=sys.stderr,
        flush=True,
    )
    import_module("vllm.entrypoints.serve.utils.api_utils").cli_env_setup()
    import_module("vllm.logger").configure_logging_from_args(args)
    command.ServeSubcommand().validate(args)
    command.ServeSubcommand.cmd(args)
