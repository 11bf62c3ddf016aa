"""YAML into frozen dataclasses, strictly: whatever does not fit is said in one line."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml

Spec = TypeVar("Spec")


class Wanted(NamedTuple):
    """What YAML must hold for a field: accepted types, and how an error names them."""

    types: Any
    what: str
    items: type | None = None


WANTED = {  # by the annotation of a field; others are read by their owners before
    "str": Wanted(str, "text"),
    "str | None": Wanted(str | None, "text or null"),
    "int": Wanted(int, "a whole number"),
    "int | None": Wanted(int | None, "a whole number or null"),
    "float": Wanted(int | float, "a number"),
    "float | None": Wanted(int | float | None, "a number or null"),
    "bool": Wanted(bool, "true or false"),
    "Mapping[str, Any]": Wanted(Mapping, "a mapping"),
    "Mapping[str, Any] | None": Wanted(Mapping | None, "a mapping or null"),
    "tuple[str, ...]": Wanted(list | tuple, "a list of texts", str),
    "tuple[int, ...]": Wanted(list | tuple, "a list of whole numbers", int),
}


RENAMED = {"num_ghosts": "num_blanks", "rehearse": "warm_up"}
"""Keys of earlier versions and what they are called now. Files with the old keys still load."""

logger = logging.getLogger("blocktune")
_reported: set[str] = set()


def current_keys(record: Mapping[str, Any], known: Collection[str], where: str) -> dict[str, Any]:
    """Replaces keys of earlier versions by their current names; see `RENAMED`.

    The first use of each old key in a process is logged in one line.

    Args:
        record: Decoded YAML or JSON.
        known: Current names of the keys; a key among them is kept as it is.
        where: Opens the line and every error.

    Raises:
        ValueError: If the record has an old key and its current name.
    """
    current: dict[str, Any] = {}
    for key, value in record.items():
        name = RENAMED.get(key, key)
        name = name if name in known and key not in known else key
        if name != key and name in record:
            raise ValueError(f"{where}: '{key}' is the old name of '{name}'; drop '{key}'")
        if name != key and key not in _reported:
            _reported.add(key)
            logger.warning("%s: '%s' is now called '%s'", where, key, name)
        current[name] = value
    return current


def load_yaml(path: str | Path, what: str, hint: str) -> Any:
    """Reads a YAML file.

    Args:
        path: The file.
        what: What it should be, for the error: ``suite``.
        hint: Where to look instead.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not YAML; names the file.
    """
    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"no {what} at '{path}'; {hint}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML ({' '.join(str(error).split())})") from None


def load_spec(path: str | Path, what: str, hint: str, parse: Callable[[Any, str], Spec]) -> Spec:
    """Reads what a YAML file describes.

    Args:
        path: The file.
        what: What it should be, for the error: ``suite``.
        hint: Where to look instead.
        parse: Builds it from the decoded YAML and the file's name, which opens every error.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: In one line: the file, the place in it, what was wanted and what came.
    """
    return parse(load_yaml(path, what, hint), str(path))


def read(spec: type[Spec], record: Any, where: str) -> Spec:
    """Builds ``spec`` from a mapping whose keys are its fields.

    Args:
        spec: A dataclass; fields of a type that `WANTED` does not know are taken as they are.
        record: Decoded YAML.
        where: Opens every error.

    Raises:
        ValueError: If a key is unknown or missing, or a value is not of its type.
    """
    known = {f.name: f for f in fields(spec)}
    record = current_keys(mapping(record, where), known, where)
    for key in record:
        if key not in known:
            raise ValueError(f"{where}: unknown key '{key}'; known: {', '.join(known)}")
    values = {key: _value(known[key], value, where) for key, value in record.items()}
    needed = [f.name for f in fields(spec) if f.default is f.default_factory is MISSING]
    if missing := [name for name in needed if name not in record]:
        raise ValueError(f"{where}: '{missing[0]}' is missing; known: {', '.join(known)}")
    try:
        return spec(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _value(field: Field, value: Any, where: str) -> Any:
    accepted, what, items = WANTED.get(field.type, Wanted(object, "given"))
    listed = items is None or (
        isinstance(value, list | tuple) and all(type(item) is items for item in value)
    )
    numeric = accepted is not bool and accepted is not object and isinstance(value, bool)
    if not isinstance(value, accepted) or numeric or not listed:
        raise ValueError(f"{where}: '{field.name}' must be {what}, got {value!r:.60}")
    return tuple(value) if items else value


def mapping(record: Any, where: str) -> Mapping:
    """``record`` if it is a mapping.

    Raises:
        ValueError: If it is none.
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"{where}: must be a mapping of keys to values, got {record!r:.60}")
    return record


def entries(record: Any, where: str) -> list:
    """``record`` if it is a list with something in it.

    Raises:
        ValueError: If it is none, or empty.
    """
    if not isinstance(record, list) or not record:
        raise ValueError(f"{where}: must be a list with at least one entry, got {record!r:.60}")
    return record


def refuse_doubles(what: str, names: list[str], fix: str) -> None:
    """Refuses names that stand twice.

    Raises:
        ValueError: Naming the one that stands most often, and the fix.
    """
    name, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise ValueError(f"{what} '{name}' stands {count} times; {fix}")
