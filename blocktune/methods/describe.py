"""Descriptions of all methods and of all values of the axes, for tables."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, NamedTuple

from blocktune.methods.base import METHODS, Axis, Cached, Weights
from blocktune.methods.composition import LAYOUT_FIELDS, TABLES
from blocktune.prompt.layout_spec import LayoutSpec
from blocktune.registry import summary_of

GROUPS = {
    "bounds": "Bounds and exact caches",
    "weights": "Reuse without recomputation, by what the weights were trained for",
    "layout": "Layout: where chunks are placed, and what they are encoded after",
    "select": "Select: which tokens are recomputed",
    "repair": "Repair: how reused keys and values are changed",
    "reshape": "Reshape: how later rows attend to reused keys",
    "several": "Several axes at once",
    "value of select": "Selectors: compose with 'PRESET + NAME'",
    "value of repair": "Repairs: compose with 'PRESET + NAME'",
    "value of reshape": "Reshapes: compose with 'PRESET + NAME'",
    "value of layout": "Layouts: compose with 'PRESET + layout KEY=VALUE'",
}
"""Headings of the table, in order."""


class Description(NamedTuple):
    """A row of the table of methods."""

    name: str  # on the command line
    kind: str  # method, selector, repair, reshape or layout
    group: str  # a key of `GROUPS`
    axes: tuple[str, ...]  # the axes that it decides
    summary: str  # first line of its docstring
    weights: str  # what the model must be trained for
    parameters: dict[str, Any]  # defaults by name
    source: str  # paper or code; may be empty


def describe_method(name: str) -> Description:
    """Describes one preset; ValueError if the name is unknown."""
    method = METHODS.find(name)()
    axes = tuple(sorted(axis.value for axis in method.axes))
    if method.cached is not Cached.CHUNKS:
        group = "bounds"
    elif method.weights is not Weights.ANY or not axes:
        group = "weights"
    else:
        group = axes[0] if len(axes) == 1 else "several"
    return Description(name, "method", group, axes, *_facts(type(method), method.weights))


def describe_all() -> list[Description]:
    """All methods, then all values of the axes, each sorted by name."""
    rows = [describe_method(name) for name in METHODS.available()]
    for axis, table in TABLES.items():
        where = table.what, f"value of {axis.value}", (axis.value,)
        rows += [Description(n, *where, *_facts(table.find(n))) for n in table.available()]
    axis, any_ = Axis.LAYOUT.value, Weights.ANY.value
    for name, summary in LAYOUT_FIELDS.items():
        facts = summary, any_, {name: getattr(LayoutSpec(), name)}, ""
        rows.append(Description(name, axis, f"value of {axis}", (axis,), *facts))
    return rows


def _facts(cls: type, weights: Weights = Weights.ANY) -> tuple[str, str, dict[str, Any], str]:
    defaults = {field.name: field.default for field in fields(cls)}
    return summary_of(cls), weights.value, defaults, cls.source
