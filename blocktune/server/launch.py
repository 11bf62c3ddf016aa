"""What `blocktune serve` makes of its options: engines, limits and a log."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

from blocktune.cache import ChunkStore
from blocktune.cache.config import StoreConfig
from blocktune.engine import Engine
from blocktune.server.config import Limits


def load_engines(
    load: Callable[..., Engine],
    model: str | None,
    adapters: list[str],
    name: str | None,
    store: str | None,
    store_bytes: int,
) -> dict[str, Engine]:
    """An engine for each adapter, or one for the bare model; they share a store.

    Args:
        load: Makes an engine of a model's name, an adapter's and a store.
        model: Name or folder; None: the adapters' own base.
        adapters: Each ``ADAPTER`` or ``NAME=ADAPTER``.
        name: That requests use for the bare model.
        store: Place and limits of the chunks, see `ChunkStore.open`.
        store_bytes: Memory for chunks.

    Raises:
        ValueError: If two have the same name.
    """
    engines: dict[str, Engine] = {}
    kept = None
    if store_bytes or store:
        kept = ChunkStore(config=StoreConfig.parse(store or "", memory=store_bytes))
    for text in adapters or [None]:
        label, equals, adapter = (text or "").partition("=")
        adapter = adapter if equals else text
        source = adapter or model
        label = label if equals else name if name and not adapter else _short(source or "")
        if label in engines:
            raise ValueError(f"two models are called '{label}'; write --adapter NAME=ADAPTER")
        engines[label] = load(model, adapter, kept)
        if kept is not None:
            kept.device = engines[label].model.device
    return engines


def _short(source: str) -> str:
    """A folder's name; other names as they are."""
    return Path(source).resolve().name if Path(source).exists() else source


def read_limits(pairs: list[str]) -> Limits:
    """Limits from ``name=value`` pairs.

    Raises:
        ValueError: If one is not a pair, or its name or value is wrong.
    """
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
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for name in ("blocktune.server", "uvicorn.error"):
        logging.getLogger(name).setLevel(logging.INFO)
