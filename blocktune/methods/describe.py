"""What the tables say of a method and of each value of an axis."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any, NamedTuple

from blocktune.methods.base import METHODS, Axis, Cached, Method, Weights
from blocktune.methods.composition import PLACE_AND_ENCODE, TABLES
from blocktune.prompt import LayoutSpec
from blocktune.registry import summary_of

GROUPS = {
    "bounds": "Bounds and exact caches",
    "weights": "Plain reuse, by what the weights were trained for",
    "layout": "Place and Encode: where chunks stand, what they were encoded after",
    "select": "Select: which tokens are computed afresh",
    "reshape": "Reshape: how later rows see reused keys",
    "several": "Several axes at once",
    "value of select": "Selectors: write 'PRESET + NAME' to compose",
    "value of reshape": "Reshapes: write 'PRESET + NAME' to compose",
    "value of layout": "Layouts: write 'PRESET + layout KEY=VALUE' to compose",
}
"""Headings of the tables, in their order."""


class Description(NamedTuple):
    """A row of the table of methods.

    Attributes:
        name: What to call it by.
        kind: ``method``, ``selector``, ``reshape`` or ``layout``.
        group: A key of `GROUPS`.
        axes: The axes that it decides.
        summary: First line of its docstring.
        weights: What the model must be trained for.
        parameters: Defaults by name.
        source: Paper or code; empty where there is none.
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
    """What `blocktune methods` and the README say of a method."""
    cls = METHODS.find(name)
    method = cls()
    axes = tuple(sorted(axis.name.lower() for axis in method.axes))
    group, weights = _group(method, axes), method.weights.value
    return Description(
        name, "method", group, axes, summary_of(cls), weights, defaults(cls), cls.source
    )


def describe_all() -> list[Description]:
    """All methods, then all values of the axes, each in the order of their names."""
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
        name_of_axis = axis.name.lower()
        for name in table.available():
            cls = table.find(name)
            facts = (summary_of(cls), Weights.ANY.value, defaults(cls), cls.source)
            group = f"value of {name_of_axis}"
            made.append(Description(name, table.what, group, (name_of_axis,), *facts))
    return made


def _layouts() -> list[Description]:
    known, axis = LayoutSpec(), Axis.LAYOUT.name.lower()
    return [
        Description(
            name,
            "layout",
            f"value of {axis}",
            (axis,),
            LAYOUT_WORDS[name],
            Weights.ANY.value,
            {name: getattr(known, name)},
            "",
        )
        for name in PLACE_AND_ENCODE
    ]


LAYOUT_WORDS = {
    "placement": "Where chunks stand: sequential, parallel, composite or reserved.",
    "slot": "Positions reserved for each chunk under placement=reserved.",
    "num_blanks": "Blank tokens that a chunk is encoded after, then hidden.",
    "shared_prefix": "Whether chunks are encoded after a hidden copy of the prefix.",
    "bos": "A chunk's own BOS: none, drop (encoded after one, then hidden) or keep.",
}
