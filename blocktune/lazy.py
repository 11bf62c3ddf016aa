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

    ``homes`` maps a module's dotted name to its public names, separated by spaces; ``a=b`` exports
    ``b`` of the module as ``a``. A name must not be that of a module in the package: once imported,
    the module would hide it.
    """
    home_of, inner = {}, {}
    for module, names in homes.items():
        for word in names.split():
            name, _, own = word.partition("=")
            home_of[name], inner[name] = module, own or name

    def get(name: str) -> Any:
        if name not in home_of:
            raise AttributeError(f"module '{package}' has no attribute '{name}'")
        return getattr(import_module(home_of[name]), inner[name])

    names = sorted(home_of)
    return get, lambda: names, names
