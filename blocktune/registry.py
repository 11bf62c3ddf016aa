"""Tables of reuse methods, selectors and reshapes, found by importing the modules that define them.

Each is a frozen dataclass, registered under its published name. A table finds the modules of its
own package, and those of plug-ins.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, TypeVar

from blocktune import plugins
from blocktune.parsing import current_keys

Entry = TypeVar("Entry", bound=type)


class Registry:
    """A table of classes by name.

    Args:
        what: What an entry is, for errors: ``reuse method``.
        package: Its modules are imported to find entries; plug-ins come after them.
    """

    def __init__(self, what: str, package: str):
        self.what, self.package = what, package
        self._entries: dict[str, type] = {}
        self._found = False

    def register(self, name: str) -> Callable[[Entry], Entry]:
        """Registers a class under its published name; fields with defaults are its parameters.

        Raises:
            ValueError: If another class has the name.
        """

        def enter(cls: Entry) -> Entry:
            taken = self._entries.get(name)
            # A module that is imported again may replace its own entry.
            if taken is not None and _home(taken) != _home(cls):
                raise ValueError(
                    f"{self.what} '{name}' of {_home(cls)} is already taken by {_home(taken)}; "
                    "choose another name"
                )
            self._entries[name] = cls
            return cls

        return enter

    def table(self) -> Mapping[str, type]:
        """All entries by name.

        Raises:
            ValueError: If a plug-in cannot be loaded.
        """
        if not self._found:
            package = importlib.import_module(self.package)
            for module in pkgutil.iter_modules(package.__path__):
                importlib.import_module(f"{self.package}.{module.name}")
            self._found = True
        plugins.load_all()
        return self._entries

    def available(self) -> list[str]:
        """All names, sorted."""
        return sorted(self.table())

    def find(self, name: str) -> type:
        """The class of a name.

        Raises:
            ValueError: If nothing has that name; the line lists what there is.
        """
        table = self.table()
        if name not in table:
            names = ", ".join(sorted(table))
            raise ValueError(f"unknown {self.what} '{name}'; available: {names}")
        return table[name]

    def build(self, name: str, **parameters: Any) -> Any:
        """Makes an entry from its name and parameters.

        Raises:
            ValueError: If the name or a parameter is unknown, or a value is out of range.
        """
        cls = self.find(name)
        known = [field.name for field in fields(cls)]
        parameters = current_keys(parameters, known, f"{self.what} '{name}'")
        if unknown := sorted(parameters.keys() - set(known)):
            takes = f"takes {', '.join(known)}" if known else "takes no parameters"
            raise ValueError(f"{self.what} '{name}' {takes}, got unknown {', '.join(unknown)}")
        return cls(**parameters)

    def name_of(self, entry: Any) -> str:
        """The name that an instance's class is registered under, else the class's own."""
        own = type(entry)
        return next((name for name, cls in self._entries.items() if cls is own), own.__name__)


def summary_of(cls: type) -> str:
    """The first line of a class's docstring."""
    return (inspect.getdoc(cls) or "").partition("\n")[0]


def _home(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
