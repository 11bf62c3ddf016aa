"""Which data sets of the Hub an example is from, kept with it through files made on the way.

A file of examples names no data set, so what was made of one would lose its licence; the commands
that write such files note it in each example's ``meta``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from blocktune.data.example import RagExample
from blocktune.data.sources.catalog import data_sets_in

DATA_SETS = "data_sets"
"""Key in ``meta``: name on the Hub -> licence."""


def credited(examples: Iterable[RagExample], source: str) -> Iterator[RagExample]:
    """Examples that say which data sets they are from, beside those that they name already.

    Args:
        examples: Loaded from ``source``.
        source: As `blocktune.data.load_examples` takes it.
    """
    named = data_sets_in(source)
    for example in examples:
        found = data_sets_of([example]) | named
        meta = example.meta | ({DATA_SETS: found} if found else {})
        yield replace(example, meta=meta)


def data_sets_of(examples: Iterable[RagExample]) -> dict[str, str]:
    """The data sets that examples say they are from: name on the Hub -> licence."""
    found: dict[str, str] = {}
    for example in examples:
        named = example.meta.get(DATA_SETS)
        if isinstance(named, Mapping):
            found |= named
    return found
