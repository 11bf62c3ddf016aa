"""From the name of a source to its examples."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from random import Random

from transformers import PreTrainedTokenizerBase

from blocktune.data.chunking import Chunker
from blocktune.data.example import TEXT_KEYS, RagExample, read_chunk, unknown_fields
from blocktune.data.sources.catalog import CATALOG, data_set
from blocktune.data.sources.options import (
    Reading,
    SourceName,
    generate,
    generators,
    parse_source,
    read_options,
)
from blocktune.data.sources.records import LeftOut, Record, at, read_hub, read_records
from blocktune.data.sources.shapes import find_shape, rename
from blocktune.data.sources.texts import POOL, with_shots
from blocktune.prompt.format import Chunk

logger = logging.getLogger("blocktune")

SNIFFED = 200  # records looked at to tell the shape; the first rows of a set may lack their context


def load_examples(
    source: str | Path,
    *,
    limit: int | None = None,
    split: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    chunker: Chunker | None = None,
) -> list[RagExample]:
    """Loads examples from a file, the Hub or a generator.

    Rows that cannot be asked (2WikiMultihopQA without its context) are left out; their number is
    logged, and so are the fields that are kept in ``meta``, once each.

    Args:
        source: A path, whose records are told apart by their fields; a short name of `CATALOG`
            (``musique``); ``hf:NAME[:CONFIG]`` on the Hugging Face Hub, or a folder; a generator
            (``worlds:test?seed=1&n=100``). After ``?`` follow options: of a generator its own, else
            those of `Reading`, such as ``?split=train&as=document&chunker=fixed&size=100``.
        limit: Load the first examples only.
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
    if not _on_the_hub(named) and not Path(named.name).is_file():
        if (generated := generate(named, tokenizer)) is None:
            raise ValueError(_no_source(source))
        _refuse_split(source, split)
        return list(islice(generated, limit))
    reading = read_options(named, split=split, tokenizer=tokenizer, chunker=chunker)
    records = open_records(named, reading, limit)
    shots = None
    if reading.shots_from is not None:
        shots = open_records(named, replace(reading, split=reading.shots_from), POOL)
    return parse_records(records, named, reading, limit, shots)


def training_split(source: str | Path) -> str | None:
    """The split to train on if a source names none; on the Hub it is not the one that is read."""
    named = parse_source(str(source))
    return "train" if _on_the_hub(named) and "split" not in named.options else None


def open_records(named: SourceName, reading: Reading, limit: int | None) -> Iterator[Record]:
    """Raw records of a file or a Hub data set, renamed, in its order or a seeded one."""
    if _on_the_hub(named):
        wanted = data_set(named.name.removeprefix("hf:"))
        records = read_hub(wanted, reading.split, limit, reading.shuffle)
    else:
        _refuse_split(named.name, reading.split)
        records = read_records(named.name)
        if reading.shuffle is not None:
            records = list(records)
            Random(reading.shuffle).shuffle(records)
    if reading.fields is None:
        return iter(records)
    fields = reading.fields
    return (Record(r.where, at(r, lambda value: rename(value, fields))) for r in records)


def load_chunks(source: str | Path) -> list[Chunk]:
    """Distinct chunks of a file, in order: of its questions, or one passage a record."""
    named = parse_source(str(source))
    reading = read_options(named)
    records = open_records(named, reading, None)
    first = list(islice(records, 1))
    records = chain(first, records)
    value = first[0].value if first else None
    a_passage = isinstance(value, dict) and any(key in value for key in TEXT_KEYS)
    if isinstance(value, str) or (a_passage and "question" not in value):
        read = partial(read_chunk, name="text")
        return list(dict.fromkeys(at(record, read) for record in records))
    examples = parse_records(records, named, reading)
    return list(dict.fromkeys(chunk for example in examples for chunk in example.chunks))


def parse_records(
    records: Iterable[Record],
    named: SourceName,
    reading: Reading,
    limit: int | None = None,
    shots: Iterable[Record] | None = None,
) -> list[RagExample]:
    """Turns records of one shape into examples; few-shot ones are drawn from ``shots``."""
    records, name = iter(records), named.name
    head = list(islice(records, SNIFFED))
    key = reading.shape or (CATALOG[name].shape if name in CATALOG else None)
    shape = find_shape((record.value for record in head), name, key)
    parse = shape.parser(reading.chunker, reading.tokenizer)
    left_out: Counter[str] = Counter()
    kept: dict[str, None] = {}

    def examples(some: Iterable[Record]) -> Iterator[RagExample]:
        for record in some:
            try:
                yield at(record, parse)
            except LeftOut as reason:
                left_out[str(reason)] += 1
                continue
            if shape.key == "blocktune":
                kept.update(dict.fromkeys(unknown_fields(record.value)))

    found = examples(chain(head, records))
    if shape.in_shots:
        others = None if shots is None else examples(shots)
        given = {"shots": reading.shots or 5, "seed": reading.seed or 0}
        found = with_shots(found, others=others, **given)
    elif (reading.shots, reading.seed, shots) != (None, None, None):
        raise ValueError(f"'shots' and 'seed' belong to few-shot, the shape is '{shape.key}'")
    found = list(islice(found, limit))
    if not found and left_out:
        reason, count = left_out.most_common(1)[0]
        raise ValueError(f"{name}: no example in it, {count} rows left out: {reason}")
    for reason, count in left_out.items():
        logger.warning("%s: left out %d rows: %s", named.text, count, reason)
    if kept:
        logger.warning("%s: kept in meta: %s", named.text, ", ".join(kept))
    return found


def _on_the_hub(named: SourceName) -> bool:
    return named.name in CATALOG or named.name.startswith("hf:")


def _no_source(source: str | Path) -> str:
    if tables := sorted(Path(source).glob("data-*.arrow")):  # as Dataset.save_to_disk leaves them
        return f"'{source}' is a folder; give a file in it, such as '{tables[0]}'"
    if Path(source).is_dir():
        return f"'{source}' is a folder; give a file in it, or 'hf:{source}' for a data set"
    if Path(source).exists():
        return f"'{source}' is a pipe or a device, which is not read; write it into a file first"
    return (
        f"no file '{source}'; a source is a file of records, 'hf:NAME[:CONFIG]', one of "
        f"{', '.join(CATALOG)}, or generated: {', '.join(f'{name}:' for name in generators())}; "
        "see `blocktune data list`"
    )


def _refuse_split(source: str | Path, split: str | None) -> None:
    if split is not None:
        raise ValueError(f"'{source}' has no splits to choose from; drop split='{split}'")
