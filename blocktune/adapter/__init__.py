"""Adapters: folders with trained weights and everything needed to serve them."""

from blocktune.adapter.info import INFO_FILE, OWN_WEIGHTS, AdapterInfo
from blocktune.adapter.load import PEFT_FILE, attach_links, load_adapter
from blocktune.adapter.releases import RELEASES, Release, find_release
from blocktune.adapter.scope import SCOPES, scope_adapter, scope_of

__all__ = [
    "INFO_FILE",
    "OWN_WEIGHTS",
    "PEFT_FILE",
    "RELEASES",
    "SCOPES",
    "AdapterInfo",
    "Release",
    "attach_links",
    "find_release",
    "load_adapter",
    "scope_adapter",
    "scope_of",
]
