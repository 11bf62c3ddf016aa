"""The command line of vLLM's server for `blocktune vllm serve`."""

from __future__ import annotations

import json
import os
import sys
from importlib.metadata import entry_points
from importlib.util import find_spec
from typing import Any

from blocktune.vllm.client import ChunkClient, lora_rank, transfer_config

SERVER = "vllm.entrypoints.openai.api_server"
GROUPS = ("vllm.general_plugins", "vllm.endpoint_plugins")


def server_command(
    model: str, adapters: dict[str, str], store: str, options: list[str], **extra: Any
) -> tuple[list[str], dict[str, str]]:
    """VLLM's command line and environment.

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
    if find_spec("vllm.config") is None:
        raise ValueError(
            "vLLM is not installed here; it needs its own environment, docs/serving.md"
        )
    known = {one.name for group in GROUPS for one in entry_points(group=group)}
    if "blocktune" not in known:
        raise ValueError(
            "vLLM looks for plug-ins among installed packages, and blocktune is not installed "
            "here; run `pip install --no-deps .` in its folder"
        )
    clients = {name: ChunkClient(model, one, store=store) for name, one in adapters.items()}
    base = ChunkClient(model, store=store, fingerprint=extra.get("fingerprint"))
    _ = next(iter(clients.values()), base).fingerprint
    loras = {name: one.lora for name, one in clients.items() if one.lora is not None}
    folders = {name: str(one.adapter) for name, one in clients.items()}
    transfer = transfer_config(store, adapters=folders, **extra)
    command = [sys.executable, "-m", SERVER, "--model", model, "--enable-prompt-tokens-details"]
    command += ["--kv-transfer-config", json.dumps(transfer)]
    if loras:
        rank = max(lora_rank(folder) for folder in loras.values())
        command += ["--enable-lora", "--max-lora-rank", str(rank), "--lora-modules"]
        command += [f"{name}={folder}" for name, folder in loras.items()]
    allowed = os.environ.get("VLLM_PLUGINS")
    names = known if allowed is None else {*allowed.split(","), "blocktune"}
    return [*command, *options], os.environ | {"VLLM_PLUGINS": ",".join(sorted(names))}
