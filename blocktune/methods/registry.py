"""The tables of the named values of each axis: selectors and reshapes."""

from __future__ import annotations

from blocktune.registry import Registry

SELECTORS = Registry("selector", "blocktune.methods.select")
"""A file of this folder, or a plug-in, enters its selector with ``@SELECTORS.register("name")``."""


RESHAPES = Registry("reshape", "blocktune.methods.reshape")
"""A file of this folder, or a plug-in, enters its reshape with ``@RESHAPES.register("name")``."""
