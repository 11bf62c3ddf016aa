"""What the tables say of a method and of each value of an axis."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any, NamedTuple

from blocktune.registry import summary_of
from blocktune.reuse.base import METHODS


class Description(NamedTuple):
    """A row of the table of methods.

    Attributes:
        name: What to call it by.
        summary: First line of its docstring.
        weights: What the model must be trained for.
        parameters: Defaults by name.
        source: Paper or code.
    """

    name: str
    summary: str
    weights: str
    parameters: dict[str, Any]
    source: str


def describe(name: str) -> Description:
    """What `blocktune methods` and the README say of a method."""
    cls = METHODS.find(name)
    return Description(name, summary_of(cls), cls.weights.value, defaults(cls), cls.source)


def defaults(cls: type) -> dict[str, Any]:
    """Parameters of an entry and their defaults; all have one."""
    known = fields(cls)
    assert all(field.default is not MISSING for field in known), f"{cls} has no default"
    return {field.name: field.default for field in known}
