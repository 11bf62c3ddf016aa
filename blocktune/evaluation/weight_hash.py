"""Which weights a run measured, so that nobody shows its results beside others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from blocktune.adapter import find_release
from blocktune.models.identity import adapter_fingerprint, base_fingerprint
from blocktune.models.load import adapter_folder


def fingerprints(engines: Mapping[str | None, Any]) -> dict[str, Any]:
    """Digests of the base and of the adapters, for the provenance.

    Args:
        engines: Adapter (None is the base) -> the engine that was loaded with it.

    Returns:
        ``base_fingerprint``, see `blocktune.models.identity`, and ``adapter_fingerprints`` by the
        adapter's name as the suite gives it; a release has none, it is no adapter of ours.
    """
    adapters = [name for name in engines if name is not None and find_release(name) is None]
    return {
        "base_fingerprint": _base(engines),
        "adapter_fingerprints": {n: adapter_fingerprint(adapter_folder(n)) for n in adapters},
    }


def _base(engines: Mapping[str | None, Any]) -> str:
    if None in engines:
        return base_fingerprint(engines[None].model)
    first = next(iter(engines.values()))  # adapters are merged; each was held to the base
    return first.adapter.base_fingerprint
