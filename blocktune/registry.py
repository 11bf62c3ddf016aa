"""Registries of methods, selectors, reshapes and chunkers, and checks of their parameters.

An entry is a frozen dataclass, registered under its published name; its fields are its parameters.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, TypeVar, dataclass_transform

from blocktune import plugins
from blocktune.parsing import current_keys, read

Entry = TypeVar("Entry", bound=type)


class Registry:
    """Classes by name, found in ``package`` and plug-ins; ``what`` describes them in errors."""

    def __init__(self, what: str, package: str):
        self.what, self.package = what, package
        self._entries: dict[str, type] = {}
        self._found = False

    @dataclass_transform(frozen_default=True)
    def register(self, name: str) -> Callable[[Entry], Entry]:
        """Registers a class as a frozen dataclass; ValueError: name taken, or no default."""

        def enter(cls: Entry) -> Entry:
            both = (cls, self._entries.get(name, cls))
            new, old = (f"{own.__module__}.{own.__qualname__}" for own in both)
            if old != new:  # a module that is reloaded may replace its own entry
                raise ValueError(
                    f"{self.what} '{name}' of {new} is already taken by {old}; choose another name"
                )
            if "__dataclass_fields__" not in vars(cls):  # not a dataclass yet
                cls = dataclass(frozen=True)(cls)
            if needed := [field.name for field in fields(cls) if field.default is MISSING]:
                raise ValueError(f"{self.what} '{name}': parameter '{needed[0]}' needs a default")
            self._entries[name] = cls
            return cls

        return enter

    def table(self) -> Mapping[str, type]:
        """All entries by name. Raises ValueError if a plug-in cannot be loaded."""
        if not self._found:
            package = importlib.import_module(self.package)
            places = getattr(package, "__path__", ())  # a single file has none
            for module in pkgutil.iter_modules(places, f"{self.package}."):
                importlib.import_module(module.name)
            self._found = True
        plugins.load_all()
        return self._entries

    def available(self) -> list[str]:
        """All names, sorted."""
        return sorted(self.table())

    def find(self, name: str) -> type:
        """The class with a name. The ValueError for an unknown name lists all names."""
        if name not in self.table():
            close = difflib.get_close_matches(name, self._entries, n=1)
            meant = f"did you mean '{close[0]}'? " if close else ""
            names = ", ".join([*self.available(), "or a plug-in's (--plugin FILE)"])
            raise ValueError(f"unknown {self.what} '{name}'; {meant}available: {names}")
        return self._entries[name]

    def build(self, name: str, /, **parameters: Any) -> Any:
        """Builds an entry. Raises ValueError for an unknown name, or a wrong type or value."""
        cls = self.find(name)
        known = [field.name for field in fields(cls)]
        parameters = current_keys(parameters, known, f"{self.what} '{name}'")
        if unknown := sorted(parameters.keys() - set(known)):
            takes = f"takes {', '.join(known)}" if known else "takes no parameters"
            raise ValueError(f"{self.what} '{name}' {takes}, got unknown {', '.join(unknown)}")
        return read(cls, parameters, f"{self.what} '{name}'")

    def name_of(self, entry: Any) -> str:
        """The registered name of an instance's class, or else the class's own name."""
        own = type(entry)
        return next((name for name, cls in self._entries.items() if cls is own), own.__name__)


def summary_of(cls: type) -> str:
    """The first line of a class's docstring."""
    return (inspect.getdoc(cls) or "").partition("\n")[0]


def require_count(name: str, value: int, least: int = 0, why: str = "") -> None:
    """Raises a `ValueError` unless ``value`` is an integer of at least ``least``."""
    if type(value) is not int or value < least:
        least = f"{least} ({why})" if why else least
        raise ValueError(f"{name} must be a whole number, at least {least}, got {value!r}")


def require_share(name: str, value: float) -> None:
    """Raises a `ValueError` unless ``value`` is a number in [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"{name} must be a share in [0, 1], got {value!r}")


def require_like(what: str, given: Any, like: Any, *dtypes: Any) -> None:
    """Raises a `ValueError` unless ``what`` returned a tensor like ``like``, or of ``dtypes``."""
    dtypes = dtypes or (like.dtype,)
    if not isinstance(given, type(like)) or given.shape != like.shape or given.dtype not in dtypes:
        wanted = f"{' or '.join(map(str, dtypes))} {tuple(like.shape)}"
        own = [str(getattr(given, name)) for name in ("dtype", "shape") if hasattr(given, name)]
        got = " ".join([type(given).__name__, *own])
        raise ValueError(f"{what} must return a tensor, {wanted}, got {got}")


def require_one_of(name: str, value: str, known: Collection[str]) -> None:
    """Raises a `ValueError` unless ``value`` is among ``known``."""
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
