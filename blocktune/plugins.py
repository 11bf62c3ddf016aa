"""Loads plug-ins: modules that register methods or their parts when they are imported.

A plug-in is named by an entry point of the group ``blocktune.plugins``, by ``blocktune --plugin``,
or by ``BLOCKTUNE_PLUGINS`` (a list with path separators). `blocktune.extras` has our own.
"""

import functools
import hashlib
import importlib
import importlib.util
import os
import pkgutil
import sys
import traceback
from importlib import metadata
from pathlib import Path

GROUP = "blocktune.plugins"
EXTRAS = "blocktune.extras"
VARIABLE = "BLOCKTUNE_PLUGINS"
FILE = "blocktune_plugin_"  # begins the name of a module that is a plug-in's file

_loaded: set[str] = set()


def add(plugin: str) -> None:
    """Adds a plug-in for this process and its children; ValueError: a file that does not exist."""
    if _is_file(plugin):
        if not Path(plugin).is_file():
            raise ValueError(f"no plug-in at '{plugin}'; give a Python file or a module's name")
        plugin = str(Path(plugin).resolve())  # a child process may start elsewhere
    if plugin not in (plugins := _named()):
        os.environ[VARIABLE] = os.pathsep.join([*plugins, plugin])


def _named() -> list[str]:
    return [part for part in os.environ.get(VARIABLE, "").split(os.pathsep) if part]


def load_all() -> None:
    """Imports all plug-ins once. Raises ValueError, with the reason, if one cannot be imported."""
    for plugin in [*_installed(tuple(sys.path)), *_named()]:
        if plugin not in _loaded:
            _loaded.add(plugin)  # before the import, because the plug-in may use a registry
            try:
                _import_file(Path(plugin)) if _is_file(plugin) else importlib.import_module(plugin)
            except (Exception, SystemExit) as error:
                _loaded.discard(plugin)
                reason = " ".join(str(error).split()) or type(error).__name__
                raise ValueError(f"plug-in '{plugin}' cannot be loaded: {reason}") from error


def place_of(error: BaseException) -> str | None:
    """Where a plug-in's code raised an error, or called what did; None if none of it ran."""
    names = {plugin.partition(".")[0] for plugin in _loaded if not _is_file(plugin)}
    for frame, line in reversed([*traceback.walk_tb(error.__traceback__)]):
        module, code = frame.f_globals.get("__name__", "").partition(".")[0], frame.f_code
        if module.startswith(FILE) or module in names - {__package__}:
            return f"plug-in '{code.co_filename}', line {line} in {code.co_name}"
    return None


@functools.cache
def _installed(path: tuple[str, ...]) -> list[str]:
    """Modules of `EXTRAS` and entry points; memoised, because reading these takes milliseconds."""
    extras = pkgutil.iter_modules(importlib.import_module(EXTRAS).__path__, f"{EXTRAS}.")
    entries = metadata.entry_points(group=GROUP)
    return [*(module.name for module in extras), *(entry.module for entry in entries)]


def _import_file(path: Path) -> None:
    """Imports a file under a name made from its path, so that equal file names do not collide."""
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]
    name = f"{FILE}{path.stem}_{digest}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or not path.is_file():
        raise ValueError("there is no such Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look up their module there
    spec.loader.exec_module(module)


def _is_file(plugin: str) -> bool:
    return plugin.endswith(".py") or os.sep in plugin
