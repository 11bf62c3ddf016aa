"""Sources as one string, ``NAME?key=value&key=value``, and the configurations such options make."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, NamedTuple, TypeVar
from urllib.parse import parse_qsl

Config = TypeVar("Config")


class SourceName(NamedTuple):
    """A source taken apart: what stands before ``?``, and the options after it."""

    text: str
    name: str
    options: dict[str, str]


def parse_source(source: str) -> SourceName:
    """Takes a source apart.

    Raises:
        ValueError: If the options are not ``key=value`` pairs, or one stands twice.
    """
    name, _, query = source.partition("?")
    try:
        pairs = parse_qsl(query, strict_parsing=True) if query else []
    except ValueError:
        raise ValueError(f"'{source}' has a query that is not key=value&key=value") from None
    options = dict(pairs)
    if len(options) < len(pairs):
        raise ValueError(f"'{source}' has an option twice; give each once")
    return SourceName(source, name, options)


def build_config(cls: type[Config], options: Mapping[str, str], where: str) -> Config:
    """Builds a dataclass from options, each read as its field's type says.

    Args:
        cls: A dataclass whose fields are ``int``, ``float``, ``str``, ``str | None`` or tuples of
            ``int`` or ``float``, written with commas.
        options: By field.
        where: Opens every error.

    Raises:
        ValueError: If an option is unknown or its value cannot be read.
    """
    known = {f.name: f.type for f in fields(cls)}
    if unknown := options.keys() - known.keys():
        names = ", ".join(known)
        raise ValueError(f"unknown option '{min(unknown)}' of '{where}'; known: {names}")
    values = {key: _read(text, known[key], f"{where}: '{key}'") for key, text in options.items()}
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _read(text: str, kind: str, where: str) -> Any:
    read, wanted = _READERS[kind]
    try:
        return read(text)
    except ValueError:
        raise ValueError(f"{where} must be {wanted}, got '{text}'") from None


def _several(read: Callable[[str], Any]) -> Callable[[str], tuple]:
    return lambda text: tuple(read(part) for part in text.split(","))


_READERS: dict[str, tuple[Callable[[str], Any], str]] = {
    "int": (int, "a whole number"),
    "int | None": (int, "a whole number"),
    "float": (float, "a number"),
    "str": (str, "text"),
    "str | None": (str, "text"),
    "tuple[int, ...]": (_several(int), "whole numbers with commas between"),
    "tuple[float, ...]": (_several(float), "numbers with commas between"),
    "tuple[str, ...]": (_several(str), "names with commas between"),
}
