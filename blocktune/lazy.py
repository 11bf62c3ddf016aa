"""Imports the public names of a package on first use.

So importing a package is cheap, and light modules in it need no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def exports(
    package: str, homes: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Makes a package's ``__getattr__``, ``__dir__`` and ``__all__``.

    ``homes`` maps a module's dotted name to its public names, separated by spaces; ``new=old``
    renames one. A name must not be that of a module in the package: once imported, the module
    would hide it.
    """
    pairs = ((module, name) for module, names in homes.items() for name in names.split())
    home_of = {name.partition("=")[0]: (module, name.rpartition("=")[2]) for module, name in pairs}

    def get(name: str) -> Any:
        if name not in home_of:
            raise AttributeError(f"module '{package}' has no attribute '{name}'")
        module, attribute = home_of[name]
        return getattr(import_module(module), attribute)

    names = sorted(home_of)
    return get, lambda: names, names
