"""Records of local files and of the Hugging Face Hub, each with the place that an error names."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from blocktune.data.sources.catalog import DataSet


class Record(NamedTuple):
    """A decoded JSON value and where it stands, e.g. ``'docs.jsonl, line 7'``."""

    where: str
    value: Any


def read_records(path: str | Path) -> Iterator[Record]:
    """Reads a JSON list or JSON lines, whatever the suffix says; ``.gz`` is unpacked.

    Raises:
        ValueError: If the file is missing, empty or not JSON; names file and line.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"'{path}' is not a file; give a JSON list or JSON lines")
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as stream:
            start = stream.read(1024).lstrip("\ufeff \t\r\n")[:1]
            stream.seek(0)
            read = _from_list if start == "[" else _from_lines
            yield from read(path.name, stream)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} is not UTF-8 text ({error})") from None
    if not start:
        raise ValueError(f"{path.name} is empty; give a JSON list or JSON lines")


def read_json(path: str | Path) -> Any:
    """Reads a file that is one JSON value, such as SQuAD's.

    Raises:
        ValueError: If the file is missing or not JSON; names file and line.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"'{path}' is not a file; give a JSON file")
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as stream:
            return json.load(stream)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} is not UTF-8 text ({error})") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path.name}, line {error.lineno}: not JSON ({error.msg})") from None


def _from_list(name: str, stream) -> Iterator[Record]:
    try:
        values = json.load(stream)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name}, line {error.lineno}: not JSON ({error.msg})") from None
    for number, value in enumerate(values, start=1):
        yield Record(f"{name}, record {number}", value)


def _from_lines(name: str, stream) -> Iterator[Record]:
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        where = f"{name}, line {number}"
        try:
            yield Record(where, json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{where}: not JSON ({error.msg}); a file is a JSON list or one object a line"
            ) from None


def read_hub(
    source: DataSet,
    split: str | None = None,
    limit: int | None = None,
    shuffle: int | None = None,
) -> Iterator[Record]:
    """Reads a data set with ``datasets``.

    Args:
        source: Repository or folder, configuration, revision.
        split: As the data set names it; None takes ``source.split``.
        limit: How many examples are wanted; only large sets must know.
        shuffle: Seed of another order than the set's. Of a large set, which comes as a stream, rows
            change places within some thousands.

    Raises:
        ValueError: If ``datasets`` is not installed, cannot load it, or a large set is asked for
            without a limit; says why in one line.
    """
    split = split or source.split
    name = source.hub + (f":{source.config}" if source.config else "")
    if source.streamed and limit is None:
        raise ValueError(f"'{name}' is too large to load as a whole; give a limit")
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError(
            f"'hf:{name}' needs the datasets package: pip install 'blocktune[data]'"
        ) from None
    try:
        rows = load_dataset(
            source.hub,
            source.config,
            split=split,
            revision=source.revision,
            streaming=source.streamed,
        )
        for number, row in _ordered(rows, source.streamed, shuffle):
            yield Record(f"{name} ({split}), record {number}", row)
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"cannot load 'hf:{name}' (split '{split}'): {reason}") from None


def _ordered(rows: Any, streamed: bool, seed: int | None) -> Iterator[tuple[int, Any]]:
    """Rows with their numbers, which are those of the set but in a stream that is shuffled."""
    if seed is None or streamed:
        yield from enumerate(rows if seed is None else rows.shuffle(seed=seed), start=1)
        return
    for index in Random(seed).sample(range(len(rows)), len(rows)):
        yield index + 1, rows[index]
