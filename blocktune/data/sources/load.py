"""One name for every source of examples."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from random import Random
from typing import Any

from transformers import PreTrainedTokenizerBase

from blocktune.data.chunking import Chunker
from blocktune.data.example import RagExample, parse_chunk
from blocktune.data.few_shot import POOL
from blocktune.data.sources.catalog import CATALOG, data_set
from blocktune.data.sources.generated import GENERATORS, generate
from blocktune.data.sources.options import Reading, SourceName, parse_source, read_options
from blocktune.data.sources.parsing import Loaded, at, parse_records
from blocktune.data.sources.records import Record, read_hub, read_records
from blocktune.prompt.format import Chunk

logger = logging.getLogger("blocktune")


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
            ``?split=train&shuffle=0&as=document&chunker=fixed&size=100``.
        limit: Stop after so many examples.
        split: Split of a Hub data set; default ``validation``, in sets that have none ``train``.
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
    shots = None
    if reading.shots_from is not None:
        shots = open_records(named, replace(reading, split=reading.shots_from), POOL)
    return parse_records(records, Path(named.name).name, reading, limit, shots)


def training_split(source: str | Path) -> str | None:
    """Split to train on where a source names none: those of the Hub are read to be judged by."""
    named = parse_source(str(source))
    on_the_hub = named.name in CATALOG or named.name.startswith("hf:")
    return "train" if on_the_hub and "split" not in named.options else None


def open_records(named: SourceName, reading: Reading, limit: int | None) -> Iterator[Record]:
    """Raw records of a file or a Hub data set, in its order or a seeded one.

    Raises:
        ValueError: As the readers do; or if a file is asked for a split.
    """
    if named.name in CATALOG or named.name.startswith("hf:"):
        wanted = data_set(named.name.removeprefix("hf:"))
        return read_hub(wanted, reading.split, limit, reading.shuffle)
    _refuse_split(named.name, reading.split)
    if reading.shuffle is None:
        return read_records(named.name)
    records = list(read_records(named.name))
    Random(reading.shuffle).shuffle(records)
    return iter(records)


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
    examples = parse_records(records, Path(path).name, Reading()).examples
    return list(dict.fromkeys(chunk for example in examples for chunk in example.chunks))


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
