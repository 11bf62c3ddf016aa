"""Imports the public names of a package on first use: light modules in it then need no torch."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def exports(
    package: str, homes: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Makes a package's ``__getattr__``, ``__dir__`` and ``__all__``.

    ``homes`` maps a module's dotted name to its public names, separated by spaces; ``NEW=OLD`` is
    another name. It must not be that of a module in the package, which would hide it once imported.
    """
    home_of = {}
    for module, names in homes.items():
        for new, _, old in (name.partition("=") for name in names.split()):
            home_of[new] = module, old or new

    def get(name: str) -> Any:
        if name not in home_of:
            raise AttributeError(f"module '{package}' has no attribute '{name}'")
        module, own = home_of[name]
        return getattr(import_module(module), own)

    public = sorted(home_of)
    return get, lambda: public, public
