"""The table of reshapes: every value of the axis Reshape, by name."""

from __future__ import annotations

from blocktune.registry import Registry

RESHAPES = Registry("reshape", "blocktune.reshape")
"""A file of this folder, or a plug-in, enters its reshape with ``@RESHAPES.register("name")``."""
