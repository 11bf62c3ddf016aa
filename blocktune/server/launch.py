"""Turns the options of `blocktune serve` into engines, limits and a log."""

from __future__ import annotations

import gc
import logging
from contextlib import suppress
from pathlib import Path
from typing import Any

from blocktune.adapter.load import load_models
from blocktune.cache import ChunkStore, PrefixTree
from blocktune.cache.store.config import StoreConfig, parse_bytes
from blocktune.engine import Engine
from blocktune.parsing import build_config, refuse_doubles, split_name
from blocktune.server.config import Limits, ServerConfig
from blocktune.server.middleware import with_timeout

KEEP_ALIVE_S = 75
"""Idle seconds before a connection is closed: longer than proxies keep theirs (often 60)."""


def load_engines(
    model: str | None,
    adapters: list[str],
    name: str | None,
    store: str | None,
    store_bytes: int,
    **options: Any,
) -> dict[str, Engine]:
    """An engine for each adapter and for the bare model, over one base's weights and one store.

    The arguments are those of ``blocktune serve``; ``options`` are `load_models`' own. There are
    ``store_bytes`` for chunks, and again for exact prefixes. Raises ValueError if two have the same
    name, or a model cannot reuse chunks.
    """
    wanted = [(label or _short(path), path) for label, path in map(split_name, adapters)]
    if name or not adapters:
        wanted.append((name or _short(model or ""), None))
    labels, names = map(list, zip(*wanted, strict=True))
    refuse_doubles("model or adapter", labels, "name it: NAME=ADAPTER")
    loaded = load_models(model, names, recurrent=False, **options)
    config = StoreConfig.parse(store or "", memory=store_bytes)
    kept = {"store": ChunkStore(device=loaded[0].model.device, config=config)}
    kept["prefix_tree"] = PrefixTree(max(1, store_bytes), store=kept["store"])
    return {
        label: Engine(base, tokenizer, adapter=info, adapter_folder=folder, **kept)
        for label, (base, tokenizer, info, folder) in zip(labels, loaded, strict=True)
    }


def _short(source: str) -> str:
    return Path(source).resolve().name if Path(source).exists() else source


def read_limits(pairs: list[str]) -> Limits:
    """Limits from ``name=value`` pairs; raises ValueError if a name or a value is wrong."""
    values = dict(pair.partition("=")[::2] for pair in pairs)
    for name, text in values.items():
        with suppress(ValueError):  # a value that is not a size is refused below, by name
            values[name] = str(parse_bytes(text)) if name.endswith("_bytes") else text
    return build_config(Limits, values, "--limit")


def uvicorn_options(config: ServerConfig, drain_s: int) -> dict[str, Any]:
    """Options of uvicorn; also sets up the log, one line per request on standard error."""
    gc.collect()
    gc.freeze()  # later collections, which would take longer than a request, skip what is here now
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for name in ("blocktune.server", "uvicorn.error"):
        logging.getLogger(name).setLevel(logging.INFO)
    return {
        "http": with_timeout(config.limits.body_s),
        "log_config": None,
        "access_log": False,
        "server_header": False,
        "timeout_keep_alive": KEEP_ALIVE_S,
        "timeout_graceful_shutdown": drain_s,
    }
