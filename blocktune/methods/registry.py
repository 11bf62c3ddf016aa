"""The registries of selectors and reshapes."""

from __future__ import annotations

from blocktune.registry import Registry

SELECTORS = Registry("selector", "blocktune.methods.select")
"""A file of ``select/`` or a plug-in registers a class with ``@SELECTORS.register("name")``."""
RESHAPES = Registry("reshape", "blocktune.methods.reshape")
"""A file of ``reshape/`` or a plug-in registers a class with ``@RESHAPES.register("name")``."""
