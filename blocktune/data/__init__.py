"""Data: sources -> examples -> layouts -> batches.

The names below are imported on first use, so that the generators of worlds stay light.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "Augment": "blocktune.data.augment",
    "Mixture": "blocktune.data.mixture",
    "RagExample": "blocktune.data.example",
    "build_chunker": "blocktune.data.chunking",
    "load_chunks": "blocktune.data.sources",
    "load_examples": "blocktune.data.sources",
    "load_mixture": "blocktune.data.mixture",
    "mix": "blocktune.data.mixture",
    "write_jsonl": "blocktune.data.example",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'blocktune.data' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)
