"""Which data sets an adapter was trained on, from its provenance."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from blocktune.data.sources.catalog import CATALOG, data_set


def datasets_of(training: Mapping[str, Any]) -> dict[str, str]:
    """Data sets on the Hub that an adapter's provenance names, with their licences.

    Args:
        training: Of `AdapterInfo`; ``data`` is a source, or a mixture of several.
    """
    found = {}
    for source in _texts(training.get("data")):
        name = source.partition("?")[0].removeprefix("hf:")
        if name in CATALOG or (source.startswith("hf:") and "/" in name):
            named = data_set(name)
            found[named.hub] = named.licence
    return found


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    inner = value.values() if isinstance(value, Mapping) else value
    if isinstance(inner, Iterable) and not isinstance(value, str):
        for part in inner:
            yield from _texts(part)
