"""Adapters: folders with what was trained and all that serving it needs to know."""

from blocktune.adapter.info import INFO_FILE, OWN_WEIGHTS, AdapterInfo
from blocktune.adapter.load import PEFT_FILE, attach_links, load_adapter

__all__ = [
    "INFO_FILE",
    "OWN_WEIGHTS",
    "PEFT_FILE",
    "AdapterInfo",
    "attach_links",
    "load_adapter",
]
