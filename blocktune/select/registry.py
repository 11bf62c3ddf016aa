"""The table of selectors: every value of the axis Select, by name."""

from __future__ import annotations

from blocktune.registry import Registry

SELECTORS = Registry("selector", "blocktune.select")
"""A file of this folder, or a plug-in, enters its selector with ``@SELECTORS.register("name")``."""
