"""From the records of a source to its examples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import Any, NamedTuple

from blocktune.data.example import RagExample
from blocktune.data.few_shot import with_shots
from blocktune.data.sources.catalog import CATALOG
from blocktune.data.sources.options import Reading
from blocktune.data.sources.records import Record
from blocktune.data.sources.schemas import LeftOut
from blocktune.data.sources.shapes import Shape, find_shape, named_shape

SNIFFED = 200
"""Records looked at to tell the shape; the first rows of a set may lack their context."""


class Loaded(NamedTuple):
    """Examples of a source, and how many rows could not be asked, by reason."""

    examples: list[RagExample]
    left_out: dict[str, int]


def parse_records(
    records: Iterable[Record],
    name: str,
    reading: Reading,
    limit: int | None = None,
    shots: Iterable[Record] | None = None,
) -> Loaded:
    """Turns records into examples.

    Args:
        records: All of one shape.
        name: The source, for errors.
        reading: Shape, chunker and shots, where they are not told by the records.
        limit: Stop after so many examples.
        shots: Records of the same shape that shots are drawn from.

    Raises:
        ValueError: If no shape fits, a record is wrong, or no example is left.
    """
    records = iter(records)
    head = list(islice(records, SNIFFED))
    shape = _shape_of(name, reading, head)
    parse = shape.parser(reading.chunker, reading.tokenizer)
    left_out: Counter[str] = Counter()

    def examples(some: Iterable[Record]) -> Iterator[RagExample]:
        for record in some:
            try:
                yield at(record, parse)
            except LeftOut as reason:
                left_out[str(reason)] += 1

    others = None if shots is None else examples(shots)
    found = list(islice(_finished(examples(chain(head, records)), shape, reading, others), limit))
    if not found and left_out:
        reason, count = left_out.most_common(1)[0]
        raise ValueError(f"{name}: no example in it, {count} rows left out: {reason}")
    return Loaded(found, dict(left_out))


def _finished(
    examples: Iterator[RagExample],
    shape: Shape,
    reading: Reading,
    others: Iterator[RagExample] | None,
) -> Iterator[RagExample]:
    if shape.in_shots:
        shots, seed = reading.shots or 5, reading.seed or 0
        return with_shots(examples, shots=shots, seed=seed, others=others)
    if (reading.shots, reading.seed, others) != (None, None, None):
        raise ValueError(f"'shots' and 'seed' belong to few-shot, the shape is '{shape.key}'")
    return examples


def _shape_of(name: str, reading: Reading, head: list[Record]) -> Shape:
    key = reading.shape or (CATALOG[name].shape if name in CATALOG else None)
    return named_shape(key) if key else find_shape((record.value for record in head), name)


def at(record: Record, parse) -> Any:
    """Parses a record and puts its place before an error."""
    try:
        if not isinstance(record.value, dict | str):
            raise ValueError(f"must be an object, got {type(record.value).__name__}")
        return parse(record.value)
    except ValueError as error:
        raise ValueError(f"{record.where}: {error}") from None
