"""Data sets of the Hub that an example comes from, with their licences, kept in its ``meta``.

A file of examples does not name its data set; the commands that write one note it in each example.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from blocktune.data.example import RagExample
from blocktune.data.sources.catalog import data_sets_in

DATA_SETS = "data_sets"
"""Key in ``meta``: name on the Hub -> licence."""


def with_data_sets(examples: Iterable[RagExample], source: str) -> Iterator[RagExample]:
    """Adds the data sets of a source to the examples' ``meta``.

    Args:
        examples: Loaded from ``source``.
        source: As for `blocktune.data.load_examples`.
    """
    named = data_sets_in(source)
    for example in examples:
        found = data_sets_of([example]) | named
        meta = example.meta | ({DATA_SETS: found} if found else {})
        yield replace(example, meta=meta)


def data_sets_of(examples: Iterable[RagExample]) -> dict[str, str]:
    """The data sets that examples name: name on the Hub -> licence."""
    found: dict[str, str] = {}
    for example in examples:
        named = example.meta.get(DATA_SETS)
        if isinstance(named, Mapping):
            found |= named
    return found
