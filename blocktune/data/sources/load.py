"""Loading: from the name of a source to its examples or chunks."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from random import Random

from transformers import PreTrainedTokenizerBase

from blocktune.data.chunking import Chunker, build_chunker, tidy
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
from blocktune.data.sources.records import LeftOut, Record, parse_record, read_hub, read_records
from blocktune.data.sources.schemas import Cutter
from blocktune.data.sources.shapes import find_shape, rename
from blocktune.data.sources.texts import with_shots
from blocktune.prompt.format import Chunk

logger = logging.getLogger("blocktune")

SNIFFED = 200  # records used to detect the shape; the first rows of a data set may lack a context


def load_examples(
    source: str | Path,
    *,
    limit: int | None = None,
    split: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    chunker: Chunker | None = None,
) -> list[RagExample]:
    """Loads examples, at least one, from a file, the Hub or a generator.

    The log counts unusable rows, which are left out, and names unknown fields, kept in ``meta``.

    Raises ValueError if the source is unknown, no shape fits, or a record is wrong; names file,
    line and field.

    Args:
        source: A file, whose record shape is detected by its fields; a short name of `CATALOG`;
            ``hf:NAME[:CONFIG]``, a data set on the Hugging Face Hub or in a folder; or a generator
            (``worlds:test?n=100``). Options follow after ``?``: a generator's own, or `Reading`'s.
        limit: Load only the first examples.
        split: Split of a Hub data set; default ``validation``, or ``train`` if it has none.
        tokenizer: For chunkers and generators that count tokens and name no tokenizer.
        chunker: Splits conversations and documents; overrides the source's option and the default.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1 or None, got {limit}")
    parsed = parse_source(str(source))
    if not on_the_hub(parsed) and not os.path.isfile(parsed.name):
        if (generated := generate(parsed, tokenizer)) is None:
            raise ValueError(_unknown_source(source))
        if split is not None:
            raise ValueError(f"'{source}' has no splits; leave split='{split}' out")
        if chunker is not None:
            raise ValueError(f"'{source}' has chunks already; leave the chunker out")
        if not (examples := list(islice(generated, limit))):
            raise ValueError(f"'{source}' generates no example; ask for at least one")
        return examples
    reading = read_options(parsed, split=split, tokenizer=tokenizer, chunker=chunker)
    return parse_records(open_records(parsed, reading, limit), parsed, reading, limit)


def training_split(source: str | Path) -> str | None:
    """The split to train on if a source names none: ``train`` on the Hub, else None."""
    parsed = parse_source(str(source))
    return "train" if on_the_hub(parsed) and "split" not in parsed.options else None


def open_records(parsed: SourceName, reading: Reading, limit: int | None) -> Iterator[Record]:
    """Reads raw records of a file or a Hub data set, with the renaming and order of ``reading``."""
    if on_the_hub(parsed):
        entry = data_set(parsed.name.removeprefix("hf:"))
        records = read_hub(entry, reading.split, limit, reading.shuffle)
    else:
        if reading.split is not None:
            raise ValueError(f"'{parsed.name}' has no splits; leave split='{reading.split}' out")
        records = read_records(parsed.name)
        if reading.shuffle is not None:
            records = list(records)
            Random(reading.shuffle).shuffle(records)
    if reading.fields is None:
        return iter(records)
    renamed = partial(rename, fields=reading.fields)
    return (Record(r.where, parse_record(r, renamed)) for r in records)


def load_chunks(source: str | Path) -> list[Chunk]:
    """Loads the distinct chunks of a file of examples, or of a file with one passage per record.

    Passages are cut by the source's ``chunker``, with ``as=document`` by the default. A chunk of
    several documents (`Chunk.document`) is returned once for each.
    """
    parsed = parse_source(str(source))
    reading = read_options(parsed)
    records = open_records(parsed, reading, None)
    first = list(islice(records, 1))
    records = chain(first, records)
    value = first[0].value if first else None
    has_text = isinstance(value, dict) and any(key in value for key in TEXT_KEYS)
    is_asked = has_text and {"question", "messages", "conversations"} & value.keys()
    is_passage = isinstance(value, str) or (has_text and not is_asked)
    if is_passage and reading.shape in (None, "document"):
        read = partial(parse_record, parse=partial(read_chunk, name="text"), types=dict | str)
        chunks = map(read, records)
        if chunker := reading.chunker or (reading.shape and build_chunker("delimiter")):
            cut = Cutter(chunker, reading.tokenizer).text
            chunks = (replace(chunk, text=t) for chunk in chunks for t in tidy(cut(chunk.text)))
    else:
        chunks = (chunk for e in parse_records(records, parsed, reading) for chunk in e.chunks)
    return list({(chunk, chunk.document): chunk for chunk in chunks}.values())


def parse_records(
    records: Iterable[Record], parsed: SourceName, reading: Reading, limit: int | None = None
) -> list[RagExample]:
    """Converts records of one shape to examples."""
    records, name = iter(records), parsed.name
    head = list(islice(records, SNIFFED))
    key = reading.shape or (CATALOG[name].shape if name in CATALOG else None)
    shape = find_shape((record.value for record in head), name, key)
    parse = shape.parser(reading.chunker, reading.tokenizer)
    left_out: Counter[str] = Counter()
    kept: dict[str, None] = {}  # names of unknown fields, in order

    def examples() -> Iterator[RagExample]:
        for record in chain(head, records):
            try:
                yield parse_record(record, parse)
            except LeftOut as reason:
                left_out[str(reason)] += 1
                continue
            if shape.key == "blocktune":
                kept.update(dict.fromkeys(unknown_fields(record.value)))

    converted = examples()
    if shape.in_shots:
        converted = with_shots(converted, reading.shots or 5, reading.seed or 0)
    elif (reading.shots, reading.seed) != (None, None):
        raise ValueError(f"'shots' and 'seed' belong to few-shot, the shape is '{shape.key}'")
    loaded = list(islice(converted, limit))
    if not loaded and left_out:
        reason, rows = left_out.most_common(1)[0]
        raise ValueError(f"{name}: no example in it, {rows} rows left out: {reason}")
    for reason, rows in left_out.items():
        logger.warning("%s: left out %d rows: %s", parsed.text, rows, reason)
    if kept:
        logger.warning("%s: kept in meta: %s", parsed.text, ", ".join(kept))
    return loaded


def on_the_hub(parsed: SourceName) -> bool:
    """Whether a source is a data set that the library ``datasets`` reads."""
    return parsed.name in CATALOG or parsed.name.startswith("hf:")


def _unknown_source(source: str | Path) -> str:
    if os.path.isdir(source):
        return f"'{source}' is a folder; give a file in it, or 'hf:{source}' for a data set"
    if os.path.exists(source):
        return f"'{source}' is a pipe or a device, which is not read; write it into a file first"
    known = ", ".join([*CATALOG, *(f"{name}:" for name in generators())])
    return (
        f"no file '{source}'; a source is a file of records, 'hf:NAME[:CONFIG]', or one of "
        f"{known}; see `blocktune data list`"
    )
