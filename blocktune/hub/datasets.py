"""Which data sets an adapter was trained on, from its provenance."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from blocktune.data.sources import data_sets_in


def datasets_of(training: Mapping[str, Any]) -> dict[str, str]:
    """Data sets on the Hub that an adapter was trained on, with their licences.

    Args:
        training: Of `AdapterInfo`; ``data`` is a source, or a mixture of several, ``data_sets``
            what the examples themselves say, which files were made of.
    """
    found = dict(training.get("data_sets") or {})
    for source in _texts(training.get("data")):
        found |= data_sets_in(source)
    return found


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    inner = value.values() if isinstance(value, Mapping) else value
    if isinstance(inner, Iterable) and not isinstance(value, str):
        for part in inner:
            yield from _texts(part)
