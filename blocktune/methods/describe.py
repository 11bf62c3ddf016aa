"""What tables say of each method and of each value of an axis."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any, NamedTuple

from blocktune.methods.base import METHODS, Axis, Cached, Method, Weights
from blocktune.methods.composition import LAYOUT_FIELDS, TABLES
from blocktune.prompt.layout_spec import LayoutSpec
from blocktune.registry import summary_of

GROUPS = {
    "bounds": "Bounds and exact caches",
    "weights": "Reuse without recomputation, by what the weights were trained for",
    "layout": "Layout: where chunks are placed, and what they are encoded after",
    "select": "Select: which tokens are recomputed",
    "reshape": "Reshape: how later rows attend to reused keys",
    "several": "Several axes at once",
    "value of select": "Selectors: compose with 'PRESET + NAME'",
    "value of reshape": "Reshapes: compose with 'PRESET + NAME'",
    "value of layout": "Layouts: compose with 'PRESET + layout KEY=VALUE'",
}
"""Headings of the tables, in order."""

LAYOUT_SUMMARIES = {
    "placement": "Where chunks are placed: sequential, parallel, composite or reserved.",
    "slot": "Positions reserved for each chunk under placement=reserved.",
    "num_blanks": "Number of blank tokens that each chunk is encoded after; they are then hidden.",
    "shared_prefix": "Whether chunks are encoded after a hidden copy of the prefix.",
    "bos": "A chunk's own BOS: none, drop (encoded after one that is then hidden) or keep.",
}


class Description(NamedTuple):
    """A row of the table of methods.

    Attributes:
        name: Its name on the command line.
        kind: ``method``, ``selector``, ``reshape`` or ``layout``.
        group: A key of `GROUPS`.
        axes: The axes that it decides.
        summary: First line of its docstring.
        weights: What the model must be trained for.
        parameters: Defaults by name.
        source: Paper or code; empty if there is none.
    """

    name: str
    kind: str
    group: str
    axes: tuple[str, ...]
    summary: str
    weights: str
    parameters: dict[str, Any]
    source: str


def describe_method(name: str) -> Description:
    """The row of one preset.

    Raises:
        ValueError: If the name is unknown.
    """
    cls = METHODS.find(name)
    method = cls()
    axes = tuple(sorted(axis.value for axis in method.axes))
    facts = (summary_of(cls), method.weights.value, defaults(cls), cls.source)
    return Description(name, "method", _group(method, axes), axes, *facts)


def describe_all() -> list[Description]:
    """All methods, then all values of the axes, each sorted by name."""
    return [*map(describe_method, METHODS.available()), *_values(), *_layouts()]


def defaults(cls: type) -> dict[str, Any]:
    """Parameters of an entry and their defaults; all have one."""
    known = fields(cls)
    assert all(field.default is not MISSING for field in known), f"{cls} has no default"
    return {field.name: field.default for field in known}


def _group(method: Method, axes: tuple[str, ...]) -> str:
    if method.cached is not Cached.CHUNKS:
        return "bounds"
    if method.weights is not Weights.ANY or not axes:
        return "weights"
    return axes[0] if len(axes) == 1 else "several"


def _values() -> list[Description]:
    made = []
    for axis, table in TABLES.items():
        for name in table.available():
            cls = table.find(name)
            facts = (summary_of(cls), Weights.ANY.value, defaults(cls), cls.source)
            made.append(
                Description(name, table.what, f"value of {axis.value}", (axis.value,), *facts)
            )
    return made


def _layouts() -> list[Description]:
    axis, known = Axis.LAYOUT.value, LayoutSpec()
    return [
        Description(
            name,
            "layout",
            f"value of {axis}",
            (axis,),
            LAYOUT_SUMMARIES[name],
            Weights.ANY.value,
            {name: getattr(known, name)},
            "",
        )
        for name in LAYOUT_FIELDS
    ]
