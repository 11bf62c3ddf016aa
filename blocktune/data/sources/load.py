"""One name for every source of examples."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

from blocktune.data.example import RagExample, parse_chunk
from blocktune.data.sources.files import Record, read_records
from blocktune.data.sources.hub import SHORT_NAMES, read_hub
from blocktune.data.sources.schemas import LeftOut, find_schema
from blocktune.data.sources.synthetic import read_worlds
from blocktune.prompt.chunk import Chunk

logger = logging.getLogger("blocktune")

SNIFFED = 200
"""Records looked at to tell the shape; the first rows of a set may lack their context."""


class Loaded(NamedTuple):
    """Examples of a source, and how many rows could not be asked, by reason."""

    examples: list[RagExample]
    left_out: dict[str, int]


def load_examples(
    source: str | Path, *, limit: int | None = None, split: str | None = None
) -> list[RagExample]:
    """Loads examples from a file, the Hub or a generator; see `load_source` for the names.

    Rows that the source is known to hold and that cannot be asked (2WikiMultihopQA without its
    context) are left out, and their number is logged.
    """
    loaded = load_source(source, limit=limit, split=split)
    for reason, count in loaded.left_out.items():
        logger.warning("%s: left out %d rows: %s", source, count, reason)
    return loaded.examples


def load_source(
    source: str | Path, *, limit: int | None = None, split: str | None = None
) -> Loaded:
    """Loads examples and counts the rows left out.

    Args:
        source: One of: a path (our JSONL, MuSiQue, 2WikiMultihopQA, HotpotQA, ``ctxs``: told
            apart by their fields); ``hf:NAME[:CONFIG][?split=S]`` on the Hugging Face Hub, or a
            folder; ``musique``, ``2wikimultihopqa``, ``hotpotqa``;
            ``worlds:SPLIT[?seed=&n=&kinds=&passages=]``.
        limit: Stop after so many examples.
        split: Split of a Hub data set, default ``validation``.

    Raises:
        ValueError: If the source is unknown, no shape fits, or a record is wrong; in one line
            that names file, line and field.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1 or None, got {limit}")
    name, _, query = str(source).partition("?")
    options = _parse_query(str(source), query)
    if name.startswith("worlds:"):
        _refuse_split(source, split)
        examples = read_worlds(name.removeprefix("worlds:"), options)
        return Loaded(list(islice(examples, limit)), {})
    if name in SHORT_NAMES or name.startswith("hf:"):
        hub_name = SHORT_NAMES.get(name, name.removeprefix("hf:"))
        return _parse(read_hub(hub_name, _hub_split(source, options, split)), name, limit)
    _refuse_split(source, split)
    if not Path(source).is_file():
        names = ", ".join(SHORT_NAMES)
        raise ValueError(
            f"no file '{source}'; a source is a JSON or JSONL file, 'hf:NAME[:CONFIG]', one of "
            f"{names}, or 'worlds:test?seed=1&n=100'"
        )
    return _parse(read_records(source), Path(source).name, limit)


def load_chunks(path: str | Path) -> list[Chunk]:
    """Distinct chunks of a file, in order: of its questions, or one ``{"text", "title"?}`` a line.

    Raises:
        ValueError: If the file holds neither; names file, line and field.
    """
    records = read_records(path)
    first = list(islice(records, 1))
    records = chain(first, records)
    value = first[0].value if first else None
    if isinstance(value, str) or (isinstance(value, dict) and "text" in value):
        return list(dict.fromkeys(_at(record, _chunk) for record in records))
    examples = _parse(records, Path(path).name, None).examples
    return list(dict.fromkeys(chunk for example in examples for chunk in example.chunks))


def _parse(records: Iterable[Record], name: str, limit: int | None) -> Loaded:
    records = iter(records)
    head = list(islice(records, SNIFFED))
    schema = find_schema((record.value for record in head), name)
    left_out: Counter[str] = Counter()

    def examples() -> Iterator[RagExample]:
        for record in chain(head, records):
            try:
                yield _at(record, schema.parse)
            except LeftOut as reason:
                left_out[str(reason)] += 1

    return Loaded(list(islice(examples(), limit)), dict(left_out))


def _at(record: Record, parse) -> Any:
    """Parses a record and puts its place before an error."""
    try:
        if not isinstance(record.value, dict | str):
            raise ValueError(f"must be an object, got {type(record.value).__name__}")
        return parse(record.value)
    except ValueError as error:
        raise ValueError(f"{record.where}: {error}") from None


def _chunk(value: Any) -> Chunk:
    return parse_chunk(value, "text")


def _parse_query(source: str, query: str) -> dict[str, str]:
    try:
        return dict(parse_qsl(query, strict_parsing=True)) if query else {}
    except ValueError:
        raise ValueError(f"'{source}' has a query that is not key=value&key=value") from None


def _hub_split(source: str | Path, options: dict[str, str], split: str | None) -> str:
    if unknown := options.keys() - {"split"}:
        raise ValueError(f"unknown option '{min(unknown)}' of '{source}'; known: split")
    return split or options.get("split", "validation")


def _refuse_split(source: str | Path, split: str | None) -> None:
    if split is not None:
        raise ValueError(f"'{source}' has no splits to choose from; drop split='{split}'")
