"""Reuse methods: every way blocktune knows to answer from chunk caches, as compositions.

The names below are imported on first use: training needs only the selectors.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "Axis": "blocktune.methods.base",
    "BOTH_LEARNED": "blocktune.methods.base",
    "Cached": "blocktune.methods.base",
    "Composition": "blocktune.methods.composition",
    "Method": "blocktune.methods.base",
    "Weights": "blocktune.methods.base",
    "available": "blocktune.methods.base",
    "build": "blocktune.methods.method_parser",
    "build_entry": "blocktune.methods.method_parser",
    "compose": "blocktune.methods.composition",
    "describe_method": "blocktune.methods.describe",
    "parse_method": "blocktune.methods.method_parser",
    "register": "blocktune.methods.base",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'blocktune.methods' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)
