"""Parses methods as written on the command line and in YAML.

```text
method = term { " + " term }
term   = NAME [ NUMBER [ "%" ] ] { KEY=VALUE }
```
For example ``block-attention + deviation 15 %``. The first term is a preset. Each further term is a
selector, a repair, a reshape, another preset, or ``layout KEY=VALUE``. A number with ``%`` is a
budget: the share of the context tokens to recompute. A number without it is the first parameter of
the term: ``epic 8`` is ``epic k=8``. Values are YAML without spaces.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from blocktune.methods.base import METHODS, Axis, Method
from blocktune.methods.composition import TABLES, compose
from blocktune.methods.select.base import Selection
from blocktune.parsing import mapping, parse_yaml, refuse_doubles
from blocktune.prompt.layout_spec import LayoutSpec

TERM = re.compile(
    r"(?P<name>[^\s=%]+)(?:\s+(?P<number>\d+(?:\.\d+)?)\s*(?P<percent>%)?)?"
    r"(?P<pairs>(?:\s+[^\s=]+=\S+)*)"
)
LAYOUT = "layout"
ENTRY_KEYS = (
    *("name", "preset", "params"),
    *("select", "repair", "reshape", "layout", "budget", "layer_budget"),
)


def build(method: str, **parameters: Any) -> Method:
    """Builds a method from its name, or a composition such as ``naive + deviation 15 %``.

    ``parameters`` are the first preset's. Raises ValueError, in one line, if it cannot be parsed,
    or a name, a parameter or a value is wrong.
    """
    terms = [" ".join(part.split()) for part in re.split(r"\s\+\s", f" {method} ")]
    first, *others = map(_match, terms)
    name, whole = first["name"], " + ".join(terms)
    for table in TABLES.values():
        if name in table.table() and name not in METHODS.table():
            raise ValueError(
                f"'{name}' is a {table.what}; start with a preset: 'naive + {terms[0]}'"
            )
    presets, given = [_preset(first, parameters)], {}
    for term in others:
        axis, value = _value(term)
        if axis is None:
            presets.append(value)
        elif axis in given:
            raise ValueError(f"'{whole}' decides '{axis}' twice; drop one")
        else:
            given[axis] = value
    return compose(*presets, **given, name=whole) if others else presets[0]


def build_entry(entry: str | Mapping[str, Any]) -> Method:
    """Builds a method from a YAML entry: what `build` takes, or a mapping.

    Example: ``{name: mine, preset: block-attention, select: {deviation: {ratio: 0.15}}}``. Without
    ``preset``, ``name`` is the method; ``params`` are the preset's; the other keys are those of
    `compose`. Raises ValueError if a key is unknown or a value is not accepted.
    """
    if isinstance(entry, str):
        return build(entry)
    if unknown := sorted(mapping(entry, "a method").keys() - set(ENTRY_KEYS), key=str):
        raise ValueError(f"unknown key '{unknown[0]}'; known: {', '.join(ENTRY_KEYS)}")
    preset = entry.get("preset") or entry.get("name")
    if not isinstance(preset, str):
        raise ValueError(f"a method needs a 'name' or a 'preset', got {dict(entry)!r:.60}")
    parameters = mapping(entry.get("params") or {}, f"'{preset}': params")
    base = build(preset, **{str(key): value for key, value in parameters.items()})
    given = {key: entry[key] for key in ENTRY_KEYS[3:] if key in entry}
    if not given:
        return base
    name = entry["name"] if "name" in entry and "preset" in entry else None
    return compose(base, **given, name=name)


def default_method(trained: LayoutSpec | None) -> Method:
    """The method that an adapter's layout was trained for; naive reuse without an adapter."""
    if trained is None or not trained.block:
        return build("naive")
    if not trained.num_learned:
        return build("block-attention")
    return build("kvlink" if trained.num_links else "kv-packet")


def parse_method(text: str, parameters: Mapping[str, Any] | None = None) -> Method:
    """Builds a method from the command line: what `build` takes, or a YAML or JSON mapping.

    Raises ValueError if it cannot be parsed, or parameters are given twice.
    """
    if not text.lstrip().startswith("{"):
        return build(text, **(parameters or {}))
    if parameters:
        raise ValueError("a method given as a mapping takes its parameters in it, under 'params'")
    return build_entry(parse_yaml(text, "--method"))


def _value(term: re.Match) -> tuple[str | None, Any]:
    """A term as a keyword argument of `compose`, or (None, preset)."""
    name = term["name"]
    axes = [axis for axis, table in TABLES.items() if name in table.table()]
    axis = Axis.LAYOUT if name == LAYOUT else next(iter(axes), None)
    if axis is None:
        return None, _preset(term, {})
    if term["percent"] and axis is not Axis.SELECT:
        raise ValueError(f"'{term[0]}': a {axis.value} takes no budget; drop the '%'")
    if axis is Axis.LAYOUT:
        return LAYOUT, _parameters(term, LayoutSpec)
    value = TABLES[axis].build(name, **_parameters(term, TABLES[axis].find(name)))
    return axis.value, _budgeted(term, value) if term["percent"] else value


def _preset(term: re.Match, parameters: Mapping[str, Any]) -> Method:
    cls = METHODS.find(term["name"])
    method = METHODS.build(term["name"], **(_parameters(term, cls) | parameters))
    # A wrong value is refused here, not in the middle of a run.
    method.layout(LayoutSpec()), method.select(), method.repair(), method.reshape()
    if not term["percent"]:
        return method
    return compose(method, select=_budgeted(term, method.select()), name=term[0])


def _budgeted(term: re.Match, selection: Selection) -> Selection:
    """The selector at the term's percentage; ValueError if the term also gives what that sets."""
    budgeted = selection.with_budget(round(float(term["number"]) / 100, 12))  # 15 % is 0.15
    for key in (pair.partition("=")[0] for pair in term["pairs"].split()):
        if getattr(selection, key, None) != getattr(budgeted, key, None):
            raise ValueError(f"'{term[0]}' gives its budget twice; drop '{key}' or the percentage")
    return budgeted


def _parameters(term: re.Match, cls: type) -> dict[str, Any]:
    pairs = [pair.split("=", 1) for pair in term["pairs"].split()]
    if term["number"] and not term["percent"]:
        if not fields(cls):
            raise ValueError(f"'{term['name']}' takes no parameters, got '{term[0]}'")
        pairs.insert(0, [fields(cls)[0].name, term["number"]])
    refuse_doubles(f"'{term['name']}':", [key for key, _ in pairs], "give it once")
    return {key: parse_yaml(value, key) for key, value in pairs}


def _match(text: str) -> re.Match:
    match = TERM.fullmatch(text)
    if match is None or ("+" in match["name"] and match["name"] not in METHODS.table()):
        raise ValueError(
            f"cannot read '{text}' as part of a method; a method is written "
            "'preset + selector 15 % key=value', with spaces around '+'"
        )
    return match
