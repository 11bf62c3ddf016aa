"""Strict parsing of YAML, JSON or option strings into frozen dataclasses, with one-line errors."""

import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, Field, fields
from inspect import formatannotation
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml

Spec = TypeVar("Spec")
_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"


class Wanted(NamedTuple):
    """The accepted values of a field."""

    types: Any  # types of a decoded value, for `isinstance`
    what: str  # description of the type, for errors
    read: Callable[[str], Any]  # parses an option string
    text: str = ""  # description of such a string, for errors; default: ``what`` without "or null"
    items: Any = None  # types of the entries of a list


def _list(read: Callable[[str], Any], what: str, text: str, items: Any) -> Wanted:
    several = lambda given: tuple(read(part) for part in given.split(","))  # noqa: E731
    return Wanted(list | tuple, f"a list of {what}", several, text, items)


def _range(text: str) -> int | tuple[int, int]:
    low, dash, high = text.partition("-")
    return (int(low), int(high)) if dash else int(low)


WANTED = {  # by the annotation of a field; values of other types are passed through unchecked
    "str": Wanted(str, "text", str),
    "str | None": Wanted(str | None, "text or null", str),
    "int": Wanted(int, "a whole number", int),
    "int | None": Wanted(int | None, "a whole number or null", int),
    "int | tuple[int, int]": Wanted(
        int | tuple | list, "a whole number or a range", _range, "a whole number or LOW-HIGH"
    ),
    "float": Wanted(int | float, "a number", float),
    "float | None": Wanted(int | float | None, "a number or null", float),
    "bool": Wanted(bool, "true or false", lambda text: bool(("0", "1").index(text)), "1 or 0"),
    "Mapping[str, Any]": Wanted(Mapping, "a mapping", yaml.safe_load),
    "Mapping[str, Any] | None": Wanted(Mapping | None, "a mapping or null", yaml.safe_load),
    "Mapping[str, float]": Wanted(
        Mapping,
        "a mapping of names to numbers",
        lambda text: dict.fromkeys(text.split(","), 1.0),
        "names with commas between",
    ),
    "tuple[str, ...]": _list(str, "texts", "names with commas between", str),
    "tuple[int, ...]": _list(int, "whole numbers", "whole numbers, with commas", int),
    "tuple[float, ...]": _list(float, "numbers", "numbers, with commas", int | float),
}


RENAMED = {"num_ghosts": "num_blanks", "rehearse": "warm_up"}  # keys of old files, still read
_reported: set[str] = set()


def current_keys(record: Mapping[str, Any], known: Collection[str], where: str) -> dict[str, Any]:
    """Replaces keys of `RENAMED`, unless ``known``; ValueError if the record has both names.

    The first use of each in a process is logged.
    """
    current: dict[str, Any] = {}
    for key, value in record.items():
        name = RENAMED.get(key, key)
        name = name if name in known and key not in known else key
        if name != key and name in record:
            raise ValueError(f"{where}: '{key}' is the old name of '{name}'; drop '{key}'")
        current[name] = value
        if name != key and key not in _reported:
            _reported.add(key)
            logging.getLogger("blocktune").warning("%s: '%s' is now called '%s'", where, key, name)
    return current


class _Loader(yaml.SafeLoader):
    """YAML loader that rejects duplicate keys; 1e-3 is a number, 010 and 1:30 are texts."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        places: dict[str, yaml.Mark] = {}
        for key, _ in node.value:
            first = places.setdefault(f"{key.tag} {key.value}", key.start_mark)
            if first is not key.start_mark:
                problem = f"'{key.value}' is given twice, first in line {first.line + 1}"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
        return super().construct_mapping(node, deep)


# As in YAML 1.2. By 1.1, which PyYAML reads, 1e-3 is text, 010 the number 8 and 1:30 is 90.
_Loader.yaml_implicit_resolvers = {
    first: [own for own in resolvers if own[0] not in (_INT, _FLOAT)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern in {
    _INT: r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F_]+|0b[01_]+)$",
    _FLOAT: r"(?=.*[.eE])[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)?$|[-+]?\.(?i:inf|nan)$",
}.items():
    _Loader.add_implicit_resolver(_tag, re.compile(_pattern), list("-+.0123456789"))


def parse_yaml(text: str, where: str) -> Any:
    """Decodes YAML or JSON from ``where``; ValueError: it is not YAML, or has a duplicate key."""
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = " ".join((error.problem or str(error)).split())
        raise ValueError(f"{where}: not YAML: {place}{problem}") from None
    except (yaml.YAMLError, ValueError) as error:  # e.g. a date with a 13th month
        raise ValueError(f"{where}: not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ValueError(f"{where}: nests lists or mappings too deeply") from None


def load_yaml(path: str | Path, what: str, hint: str) -> Any:
    """Reads a YAML file; FileNotFoundError, with ``what`` it is and a ``hint``: there is none."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (FileNotFoundError, IsADirectoryError):
        raise FileNotFoundError(f"no {what} at '{path}'; {hint}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason}, byte {error.start})") from None
    return parse_yaml(text, str(path))


def load_json(path: str | Path) -> Any:
    """Decodes a JSON file. Raises ValueError, with its name, if it is not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); damaged, or from another program") from None


def load_spec(path: str | Path, what: str, hint: str, parse: Callable[[Any, str], Spec]) -> Spec:
    """Reads a YAML file like `load_yaml`, and passes its content and name to ``parse``."""
    return parse(load_yaml(path, what, hint), str(path))


def read(spec: type[Spec], record: Any, where: str) -> Spec:
    """Builds ``spec`` from a mapping (decoded YAML or JSON) whose keys are its fields.

    Fields whose type is not in `WANTED` are not checked. Raises ValueError, starting with
    ``where``, if a key is unknown or missing, or a value has the wrong type.
    """
    record = _known(spec, record, where)
    values = {f.name: _value(f, record[f.name], where) for f in fields(spec) if f.name in record}
    return _construct(spec, values, where)


def check_types(config: Any, where: str) -> None:
    """Raises ValueError if a field of a dataclass has a value of another type than its own."""
    for field in fields(config):
        _value(field, getattr(config, field.name), where)


def build_strict(spec: type[Spec], record: Any, what: str) -> Spec:
    """Like `read`, for a ``spec`` that checks its values itself; ``what`` names it in errors."""
    return spec(**_known(spec, record, what))


def _known(spec: type, record: Any, where: str) -> dict[str, Any]:
    known = [field.name for field in fields(spec)]
    record = current_keys(mapping(record, where), known, where)
    if unknown := sorted(record.keys() - set(known), key=str):
        raise ValueError(f"{where}: unknown key '{unknown[0]}'; known: {', '.join(known)}")
    return record


def build_config(
    spec: type[Spec],
    options: Mapping[str, str],
    where: str,
    names: Mapping[str, str] | None = None,
    **given: Any,
) -> Spec:
    """Builds ``spec`` from option strings, each parsed by the type of its field.

    ``names`` maps options to fields with other names; fields that are ``given`` are no options.
    Raises ValueError, starting with ``where``, if one is unknown or cannot be parsed.
    """
    option_of = {field: option for option, field in (names or {}).items()}
    known = {option_of.get(f.name, f.name): f for f in fields(spec) if f.name not in given}
    if unknown := options.keys() - known.keys():
        raise ValueError(f"unknown option '{min(unknown)}' of '{where}'; known: {', '.join(known)}")
    values = {known[key].name: _option(known[key], key, options[key], where) for key in options}
    return _construct(spec, values | given, where)


def _option(field: Field, key: str, text: str, where: str) -> Any:
    wanted = WANTED.get(_annotation(field)) or Wanted(object, "YAML", yaml.safe_load)
    try:
        return wanted.read(text)
    except (ValueError, yaml.YAMLError):
        what = wanted.text or wanted.what.removesuffix(" or null")
        raise ValueError(f"{where}: '{key}' must be {what}, got '{text}'") from None


def _construct(spec: type[Spec], values: Mapping[str, Any], where: str) -> Spec:
    needed = [f.name for f in fields(spec) if f.default is f.default_factory is MISSING]
    if missing := [name for name in needed if name not in values]:
        known = ", ".join(field.name for field in fields(spec))
        raise ValueError(f"{where}: '{missing[0]}' is missing; known: {known}")
    try:
        return spec(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _value(field: Field, value: Any, where: str) -> Any:
    if (wanted := WANTED.get(_annotation(field))) is None:
        return value
    fits = _is(value, wanted.types)
    if not fits or (wanted.items and not all(_is(item, wanted.items) for item in value)):
        quote = "; put it in quotes" * (wanted.read is str and isinstance(value, int | float))
        raise ValueError(f"{where}: '{field.name}' must be {wanted.what}, got {value!r:.60}{quote}")
    return tuple(value) if wanted.items else value


def _annotation(field: Field) -> str:
    """A field's type as source text, also if annotations are evaluated."""
    text = field.type if isinstance(field.type, str) else formatannotation(field.type)
    return re.sub(r"\b(typing|collections\.abc)\.", "", text)


def _is(value: Any, types: Any) -> bool:
    """`isinstance`, except that booleans are not numbers."""
    return isinstance(value, types) and (types is bool or not isinstance(value, bool))


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def mapping(record: Any, where: str) -> Mapping:
    """Returns ``record`` if it is a mapping, else raises ValueError."""
    if not isinstance(record, Mapping):
        raise ValueError(f"{where}: must be a mapping of keys to values, got {record!r:.60}")
    return record


def entries(record: Any, where: str) -> list:
    """Returns ``record`` if it is a non-empty list, else raises ValueError."""
    if not isinstance(record, list) or not record:
        raise ValueError(f"{where}: must be a list with at least one entry, got {record!r:.60}")
    return record


def split_name(text: str) -> tuple[str, str]:
    """Splits ``NAME=PATH``; the name is "" for a path alone. If it exists, it may have ``=``."""
    name, _, path = text.partition("=")
    return (name, path) if name and path and not Path(text).exists() else ("", text)


def refuse_doubles(what: str, names: list[str], fix: str) -> None:
    """Raises ValueError, with the ``fix``, if a name occurs more than once."""
    for name, count in Counter(names).most_common(1):
        if count > 1:
            raise ValueError(f"{what} '{name}' is given {count} times; {fix}")
