"""Mappings into frozen dataclasses, strictly: from YAML, JSON or option strings.

Whatever does not fit is reported in one line: where it is, what was wanted and what came.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields
from inspect import formatannotation
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml

Spec = TypeVar("Spec")


class Wanted(NamedTuple):
    """What a field may hold: types, their name in an error, and how text is read as one.

    Attributes:
        types: For `isinstance`.
        what: As an error calls them.
        read: Reads an option string.
        items: Of a list, the types of its entries.
    """

    types: Any
    what: str
    read: Callable[[str], Any]
    items: Any = None


def _several(read: Callable[[str], Any]) -> Callable[[str], tuple]:
    return lambda text: tuple(read(part) for part in text.split(","))


WANTED = {  # by the annotation of a field; fields of other types are read by their owners before
    "str": Wanted(str, "text", str),
    "str | None": Wanted(str | None, "text or null", str),
    "int": Wanted(int, "a whole number", int),
    "int | None": Wanted(int | None, "a whole number or null", int),
    "float": Wanted(int | float, "a number", float),
    "float | None": Wanted(int | float | None, "a number or null", float),
    "bool": Wanted(bool, "true or false", {"true": True, "false": False}.__getitem__),
    "Mapping[str, Any]": Wanted(Mapping, "a mapping", yaml.safe_load),
    "Mapping[str, Any] | None": Wanted(Mapping | None, "a mapping or null", yaml.safe_load),
    "tuple[str, ...]": Wanted(list | tuple, "a list of texts", _several(str), str),
    "tuple[int, ...]": Wanted(list | tuple, "a list of whole numbers", _several(int), int),
    "tuple[float, ...]": Wanted(list | tuple, "a list of numbers", _several(float), int | float),
}


class _Loader(yaml.SafeLoader):
    """YAML in which a key that is given twice is an error, not the last one's value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        places: dict[str, yaml.Mark] = {}
        for key, _ in node.value:
            first = places.setdefault(f"{key.tag} {key.value}", key.start_mark)
            if first is not key.start_mark:
                problem = f"'{key.value}' is given twice, first in line {first.line + 1}"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str, where: str) -> Any:
    """Decodes YAML, or JSON, which is YAML.

    Args:
        text: To decode.
        where: Opens every error: the file's name.

    Raises:
        ValueError: If it is not YAML or gives a key twice; names line and column.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = " ".join((error.problem or str(error)).split())
        raise ValueError(f"{where}: not YAML: {place}{problem}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{where}: not YAML: {' '.join(str(error).split())}") from None


def load_yaml(path: str | Path, what: str, hint: str) -> Any:
    """Reads a YAML file.

    Args:
        path: The file.
        what: What it should be, for the error: ``suite``.
        hint: Where to look instead.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: See `parse_yaml`.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError):
        raise FileNotFoundError(f"no {what} at '{path}'; {hint}") from None
    return parse_yaml(text, str(path))


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


def build_config(spec: type[Spec], options: Mapping[str, str], where: str) -> Spec:
    """Builds ``spec`` from option strings, each read as its field's type says.

    Args:
        spec: A dataclass whose fields `WANTED` knows; lists are written with commas.
        options: By field.
        where: Opens every error: ``worlds:test``.

    Raises:
        ValueError: If an option is unknown or its value cannot be read.
    """
    known, values = {field.name: field for field in fields(spec)}, {}
    for key, text in options.items():
        if key not in known:
            raise ValueError(f"unknown option '{key}' of '{where}'; known: {', '.join(known)}")
        wanted = WANTED[_annotation(known[key])]
        try:
            values[key] = wanted.read(text)
        except (ValueError, KeyError, yaml.YAMLError):
            what = wanted.what.removesuffix(" or null")
            if wanted.items:
                what = f"{what.removeprefix('a list of ')} with commas between"
            raise ValueError(f"{where}: '{key}' must be {what}, got '{text}'") from None
    return read(spec, values, where)


def read(spec: type[Spec], record: Any, where: str) -> Spec:
    """Builds ``spec`` from a mapping whose keys are its fields.

    Args:
        spec: A dataclass; fields of a type that `WANTED` does not know are taken as they are.
        record: Decoded YAML.
        where: Opens every error.

    Raises:
        ValueError: If a key is unknown or missing, or a value is not of its type.
    """
    record, known = mapping(record, where), {f.name: f for f in fields(spec)}
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
    if (wanted := WANTED.get(_annotation(field))) is None:
        return value
    accepted, what, _, items = wanted
    fits = _is(value, accepted) and (items is None or all(_is(item, items) for item in value))
    if not fits:
        raise ValueError(f"{where}: '{field.name}' must be {what}, got {value!r:.60}")
    return tuple(value) if items else value


def _annotation(field: Field) -> str:
    """A field's type as it is written, also where annotations are evaluated."""
    return field.type if isinstance(field.type, str) else formatannotation(field.type)


def _is(value: Any, types: Any) -> bool:
    """`isinstance`, but true and false are no numbers."""
    return isinstance(value, types) and (types is bool or not isinstance(value, bool))


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
    """Refuses names that are given twice.

    Raises:
        ValueError: Naming the most frequent one, and the fix.
    """
    name, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise ValueError(f"{what} '{name}' is given {count} times; {fix}")
