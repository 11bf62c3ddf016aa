"""VLLM's server over a store, for `blocktune vllm serve`."""

from __future__ import annotations

import json
import os
import sys
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

SERVER = "vllm.entrypoints.launchers.api_server.entry"
GROUPS = ("vllm.general_plugins", "vllm.endpoint_plugins")


def serve(
    model: str, adapters: dict[str, str], store: str, options: list[str], **extra: Any
) -> None:
    """Runs vLLM's server until it is stopped.

    It runs in this process: what was imported to look into the store is not imported again.

    Args:
        model: As vLLM takes it.
        adapters: Folders or repositories by the names that requests use.
        store: Of the chunks, as ``--store``.
        options: vLLM's own.
        extra: More of ``kv_connector_extra_config``.

    Raises:
        ValueError: If vLLM is not there or would not find blocktune, an adapter cannot be served,
            or the store has no chunks of the default model.
    """
    try:
        import_module("vllm.config")  # before torch: it prepares the environment
    except ModuleNotFoundError:
        raise ValueError(
            "vLLM is not installed here; it needs its own environment, docs/vllm.md"
        ) from None
    known = {one.name for group in GROUPS for one in entry_points(group=group)}
    if "blocktune" not in known:
        raise ValueError(
            "vLLM looks for plug-ins among installed packages, and blocktune is not installed "
            "here; run `pip install .` in its folder"
        )
    from blocktune.vllm.client import ChunkClient, lora_rank, transfer_config

    clients = {name: ChunkClient(model, one, store=store) for name, one in adapters.items()}
    base = ChunkClient(model, store=store, fingerprint=extra.get("fingerprint"))
    allowed = os.environ.get("VLLM_PLUGINS")
    names = known if allowed is None else {*allowed.split(","), "blocktune"}
    os.environ["VLLM_PLUGINS"] = ",".join(sorted(names))
    if not any(one.startswith(("--kv-cache-memory", "--gpu-memory")) for one in options):
        # On a CPU vLLM would take most of the machine's memory, and not start if that is used.
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
    first = next(iter(clients.values()), base).fingerprint
    loras = {name: one.lora for name, one in clients.items() if one.lora is not None}
    folders = {name: str(one.adapter) for name, one in clients.items()}
    transfer = transfer_config(store, adapters=folders, **extra)
    line = ["--model", model, "--enable-prompt-tokens-details"]
    line += ["--kv-transfer-config", json.dumps(transfer)]
    if loras:
        rank = max(lora_rank(folder) for folder in loras.values())
        line += ["--enable-lora", "--max-lora-rank", str(rank), "--lora-modules"]
        line += [f"{name}={folder}" for name, folder in loras.items()]
    print(
        f"chunks of {model} ({first[:12]}) in '{store}'; vLLM starts in about a minute (its log "
        'follows), and is ready at "Application startup complete"',
        file=sys.stderr,
        flush=True,
    )
    sys.argv[1:] = [*line, *options]
    import_module(SERVER).main()
