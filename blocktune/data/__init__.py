"""Data: sources -> examples -> layouts -> batches.

The names below are imported on first use, so that the generators of worlds stay light.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "RagExample": "blocktune.data.example",
    "load_chunks": "blocktune.data.sources",
    "load_examples": "blocktune.data.sources",
    "write_jsonl": "blocktune.data.example",
}

__all__ = ["RagExample", "load_chunks", "load_examples", "write_jsonl"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'blocktune.data' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)
