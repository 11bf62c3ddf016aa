"""One name for every source of examples."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from blocktune.data.chunking import Chunker
from blocktune.data.example import RagExample, parse_chunk
from blocktune.data.shots import with_shots
from blocktune.data.sources.catalog import CATALOG, data_set
from blocktune.data.sources.files import Record, read_records
from blocktune.data.sources.generated import GENERATORS, generate
from blocktune.data.sources.hub import read_hub
from blocktune.data.sources.options import SourceName, parse_source
from blocktune.data.sources.reading import Reading, read_options
from blocktune.data.sources.schemas import LeftOut
from blocktune.data.sources.shapes import Shape, find_shape, named_shape
from blocktune.prompt.chunk import Chunk

logger = logging.getLogger("blocktune")

SNIFFED = 200
"""Records looked at to tell the shape; the first rows of a set may lack their context."""


class Loaded(NamedTuple):
    """Examples of a source, and how many rows could not be asked, by reason."""

    examples: list[RagExample]
    left_out: dict[str, int]


def load_examples(
    source: str | Path,
    *,
    limit: int | None = None,
    split: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    chunker: Chunker | None = None,
) -> list[RagExample]:
    """Loads examples from a file, the Hub or a generator; see `load_source` for the names.

    Rows that the source is known to hold and that cannot be asked (2WikiMultihopQA without its
    context) are left out, and their number is logged.
    """
    loaded = load_source(source, limit=limit, split=split, tokenizer=tokenizer, chunker=chunker)
    for reason, count in loaded.left_out.items():
        logger.warning("%s: left out %d rows: %s", source, count, reason)
    return loaded.examples


def load_source(
    source: str | Path,
    *,
    limit: int | None = None,
    split: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    chunker: Chunker | None = None,
) -> Loaded:
    """Loads examples and counts the rows left out.

    Args:
        source: One of: a path, whose records are told apart by their fields; a short name of
            `CATALOG` (``musique``, ``tulu-3``); ``hf:NAME[:CONFIG]`` on the Hugging Face Hub, or a
            folder; a generator (``worlds:test?seed=1&n=100``, ``ruler:vt?length=4096``). After
            ``?`` stand options: of a generator its own, else those of `Reading`, such as
            ``?split=train&as=document&chunker=fixed&size=100``.
        limit: Stop after so many examples.
        split: Split of a Hub data set, default ``validation``.
        tokenizer: Counts tokens where a chunker or a generator wants that and names none itself.
        chunker: Cuts conversations and documents, instead of the shape's own or the option's.

    Raises:
        ValueError: If the source is unknown, no shape fits, or a record is wrong; in one line
            that names file, line and field.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1 or None, got {limit}")
    named = parse_source(str(source))
    if named.name.partition(":")[0] in GENERATORS and ":" in named.name:
        _refuse_split(source, split)
        return Loaded(list(islice(generate(named, tokenizer), limit)), {})
    if not (named.name in CATALOG or named.name.startswith("hf:") or Path(named.name).is_file()):
        raise ValueError(_no_source(source))
    reading = read_options(named, split=split, tokenizer=tokenizer, chunker=chunker)
    records = open_records(named, reading, limit)
    return _parse(records, Path(named.name).name, reading, limit)


def open_records(named: SourceName, reading: Reading, limit: int | None) -> Iterator[Record]:
    """Raw records of a file or a Hub data set.

    Raises:
        ValueError: As the readers do; or if a file is asked for a split.
    """
    if named.name in CATALOG or named.name.startswith("hf:"):
        wanted = data_set(named.name.removeprefix("hf:"))
        return read_hub(wanted, reading.split or "validation", limit)
    _refuse_split(named.name, reading.split)
    return read_records(named.name)


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
        return list(dict.fromkeys(at(record, _chunk) for record in records))
    examples = _parse(records, Path(path).name, Reading(), None).examples
    return list(dict.fromkeys(chunk for example in examples for chunk in example.chunks))


def _parse(records: Iterable[Record], name: str, reading: Reading, limit: int | None) -> Loaded:
    records = iter(records)
    head = list(islice(records, SNIFFED))
    shape = _shape_of(name, reading, head)
    parse = shape.parser(reading.chunker, reading.tokenizer)
    left_out: Counter[str] = Counter()

    def examples() -> Iterator[RagExample]:
        for record in chain(head, records):
            try:
                yield at(record, parse)
            except LeftOut as reason:
                left_out[str(reason)] += 1

    found = list(islice(_finished(examples(), shape, reading), limit))
    if not found and left_out:
        reason, count = left_out.most_common(1)[0]
        raise ValueError(f"{name}: no example in it, {count} rows left out: {reason}")
    return Loaded(found, dict(left_out))


def _finished(
    examples: Iterator[RagExample], shape: Shape, reading: Reading
) -> Iterator[RagExample]:
    if shape.in_shots:
        return with_shots(examples, shots=reading.shots or 5, seed=reading.seed or 0)
    if (reading.shots, reading.seed) != (None, None):
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


def _chunk(value: Any) -> Chunk:
    return parse_chunk(value, "text")


def _no_source(source: str | Path) -> str:
    return (
        f"no file '{source}'; a source is a JSON or JSONL file, 'hf:NAME[:CONFIG]', one of "
        f"{', '.join(CATALOG)}, or generated: {', '.join(f'{name}:' for name in GENERATORS)}; "
        "see `blocktune data list`"
    )


def _refuse_split(source: str | Path, split: str | None) -> None:
    if split is not None:
        raise ValueError(f"'{source}' has no splits to choose from; drop split='{split}'")
