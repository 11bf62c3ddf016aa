"""The axes whose values have names: looking a value up, and writing it down again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

import yaml

from blocktune.reshape import RESHAPES
from blocktune.reuse.base import Axis, Method
from blocktune.select import SELECTORS

TABLES = {Axis.SELECT: SELECTORS, Axis.RESHAPE: RESHAPES}
"""The axes whose values are registered; values of Place and Encode are fields of `LayoutSpec`."""

Choice = Any
"""A value of an axis: an instance, a registered name, ``{name: {parameter: value}}``, or None."""


def choose(axis: Axis, choice: Choice) -> Any:
    """An axis's value from whatever names it; None stays None.

    Raises:
        ValueError: If the name or a parameter is unknown.
    """
    registry = TABLES[axis]
    if isinstance(choice, str):
        return registry.build(choice)
    if not isinstance(choice, Mapping):
        return choice
    if len(choice) != 1:
        raise ValueError(
            f"a {registry.what} is written as {{name: {{parameter: value}}}}, got {choice!r:.60}"
        )
    [(name, parameters)] = choice.items()
    if not isinstance(parameters, Mapping | None):
        raise ValueError(
            f"{registry.what} '{name}' takes a mapping of parameters, got {parameters!r:.60}"
        )
    return registry.build(name, **(parameters or {}))


def say(terms: tuple[Method, ...], given: Mapping[Axis, Any]) -> str:
    """The composition as one would write it on the command line."""
    parts = [_say_entry(term.name, term) for term in terms]
    if Axis.LAYOUT in given:
        parts.append(" ".join(["layout", *(_pair(k, v) for k, v in given[Axis.LAYOUT].items())]))
    for axis, table in TABLES.items():
        if axis in given:
            value = given[axis]
            known = "nothing" if axis is Axis.SELECT else f"no {table.what}"
            parts.append(_say_entry(table.name_of(value), value) if value else known)
    return " + ".join(parts)


def _say_entry(name: str, entry: Any) -> str:
    """A name and the parameters that differ from their defaults."""
    known = (f for f in fields(entry) if f.default is not MISSING)
    changed = [(f.name, getattr(entry, f.name)) for f in known]
    defaults = {f.name: f.default for f in fields(entry)}
    return " ".join([name, *(_pair(k, v) for k, v in changed if v != defaults[k])])


def _pair(key: str, value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n...\n")
    return f"{key}={''.join(text.split())}"
