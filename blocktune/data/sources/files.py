"""Records of a local file, each with the place that an error about it names."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple


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
