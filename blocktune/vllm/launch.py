"""Runs vLLM's server over a store, for `blocktune vllm serve`."""

from __future__ import annotations

import json
import os
import sys
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

GROUPS = ("vllm.general_plugins", "vllm.endpoint_plugins")


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
    plugins = {point.name for group in GROUPS for point in entry_points(group=group)}
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
    line = ["--model", bare, "--enable-prompt-tokens-details"]
    line += ["--revision", revision] if revision else []
    line += ["--kv-transfer-config", json.dumps(transfer)]
    if loras := {name: client.lora for name, client in clients.items() if client.lora}:
        rank = max(lora_rank(folder) for folder in loras.values())
        line += ["--enable-lora", "--max-lora-rank", str(rank), "--lora-modules"]
        # JSON, since a folder may have "=" in its name
        line += [json.dumps({"name": name, "path": str(loras[name])}) for name in loras]
    print(
        f"chunks of {model} ({first[:12]}) in '{store}'; vLLM starts in about a minute (its log "
        'follows), and is ready at "Application startup complete"',
        file=sys.stderr,
        flush=True,
    )
    sys.argv[1:] = [*line, *options]
    import_module("vllm.entrypoints.launchers.api_server.entry").main()
