"""Composes methods of presets and of values for single axes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, replace
from enum import Enum
from functools import reduce
from typing import TYPE_CHECKING, Any

import yaml

from blocktune.methods.base import METHODS, Axis, Cached, Method, Weights
from blocktune.methods.repair import REPAIRS, Repair
from blocktune.methods.reshape import RESHAPES, Reshape
from blocktune.methods.select.base import SELECTORS, Nothing, Selection
from blocktune.parsing import current_keys, mapping
from blocktune.prompt.layout_spec import LayoutSpec
from blocktune.registry import require_share

if TYPE_CHECKING:
    from blocktune.cache import ChunkStore
    from blocktune.methods.base import ChunkLoader, PromptHistory

TABLES = {Axis.SELECT: SELECTORS, Axis.REPAIR: REPAIRS, Axis.RESHAPE: RESHAPES}
"""Registries of axis values; the axis layout has fields of `LayoutSpec` instead."""
_BASES = {Axis.SELECT: Selection, Axis.REPAIR: Repair, Axis.RESHAPE: Reshape}
LAYOUT_FIELDS = {
    "placement": "Where chunks are placed: sequential, parallel, composite or reserved.",
    "slot": "Positions reserved for each chunk under placement=reserved.",
    "num_blanks": "Number of blank tokens that each chunk is encoded after; they are then hidden.",
    "shared_prefix": "Whether chunks are encoded after a hidden copy of the prefix.",
    "bos": "A chunk's own BOS: none, drop (encoded after one that is then hidden) or keep.",
}
"""Fields of `LayoutSpec` that a method chooses; the others depend on the adapter's training."""


Keep = Enum("Keep", "KEEP")
KEEP = Keep.KEEP
"""The presets decide this axis; None means naive reuse on it."""


@dataclass(frozen=True, kw_only=True)
class Composition(Method):
    """Presets, some of whose axes may be overridden; made by `compose`."""

    label: str  # name in tables and results
    terms: tuple[Method, ...]  # the presets
    source: str
    weights: Weights
    warm_up: int
    selected: Selection
    repaired: Repair | None
    reshaped: Reshape | None
    changes: tuple[tuple[str, Any], ...]  # layout fields set after the presets' own changes
    decided: frozenset[Axis]
    layer_budget: float | None

    @property
    def name(self) -> str:
        return self.label

    @property
    def axes(self) -> frozenset[Axis]:
        return self.decided

    @property
    def history(self) -> PromptHistory | None:
        for term in self.terms:
            if term.history is not None:
                own = self.layer_budget is None and self.selected == term.select()
                return term.history if own else term.history.without_selection()
        return None

    def loader(self, store: ChunkStore, fingerprint: str) -> ChunkLoader | None:
        loaders = (term.loader(store, fingerprint) for term in self.terms)
        return next(filter(None, loaders), None)

    def layout(self, spec: LayoutSpec) -> LayoutSpec:
        spec = reduce(lambda spec, term: term.layout(spec), self.terms, spec)
        return replace(spec, **dict(self.changes))

    def select(self) -> Selection:
        return self.selected

    def repair(self) -> Repair | None:
        return self.repaired

    def reshape(self) -> Reshape | None:
        return self.reshaped


def compose(
    base: str | Method,
    *others: str | Method,
    select: Any = KEEP,
    repair: Any = KEEP,
    reshape: Any = KEEP,
    layout: Mapping[str, Any] | None = None,
    budget: float | None = None,
    layer_budget: float | None = None,
    name: str | None = None,
) -> Composition:
    """Composes a method of presets and values for single axes.

    Args:
        base: A preset: its name, or an instance.
        others: More presets; no two may decide the same axis, or the same field of the layout.
        select: The selector, instead of the presets' own: an instance, a registered name,
            ``{name: {parameter: value}}``, or None for naive reuse.
        repair: The repair, likewise.
        reshape: The reshape, likewise.
        layout: Fields of `LayoutSpec` to set, out of `LAYOUT_FIELDS`.
        budget: Share of the context tokens that the selector may choose, in [0, 1].
        layer_budget: Share of the context's layer-tokens to recompute, in [0, 1]; by default that
            of the presets, unless ``select`` or ``budget`` is given.
        name: Name in tables; by default the method as written on the command line.

    Raises ValueError if a name, a key or a value is unknown, presets decide the same axis or need
    different weights, or a preset takes nothing from cached chunks.
    """
    terms = tuple(
        METHODS.build(term) if isinstance(term, str) else term for term in (base, *others)
    )
    weights = _weights(terms)
    chosen = zip(TABLES, (select, repair, reshape), strict=True)
    given = {axis: _choose(axis, value) for axis, value in chosen if value is not KEEP}
    selection = _decide(terms, given, Axis.SELECT) or Nothing()
    if budget is not None:
        given[Axis.SELECT] = selection = selection.with_budget(budget)
    if layer_budget is not None:
        require_share("layer_budget", layer_budget)
        if budget is not None:
            raise ValueError("budget and layer_budget exclude each other; drop one")
    if given.get(Axis.REPAIR) is not None and selection.whole_layers:
        raise ValueError(
            "a repair shifts reused tokens as the recomputed ones, and "
            f"'{SELECTORS.name_of(selection)}' recomputes all or none; add a selector: deviation"
        )
    if layout:
        given[Axis.LAYOUT] = layout = _layout_changes(layout)
    at_budget = "" if layer_budget is None else f" at {layer_budget:.1%} of the layer-tokens"
    if layer_budget is None and Axis.SELECT not in given:
        layer_budget = next((t.layer_budget for t in terms if t.layer_budget is not None), None)
    composed = Composition(
        label=name or format_method(terms, given) + at_budget,
        terms=terms,
        source=terms[0].source,
        weights=weights,
        warm_up=max(term.warm_up for term in terms),
        selected=selection,
        repaired=_decide(terms, given, Axis.REPAIR),
        reshaped=_decide(terms, given, Axis.RESHAPE),
        changes=tuple((layout or {}).items()),
        decided=frozenset(given).union(*(term.axes for term in terms)),
        layer_budget=layer_budget,
    )
    # A value out of range is refused here.
    layouts = {replace(composed, terms=t).layout(LayoutSpec()) for t in (terms, terms[::-1])}
    if len(layouts) > 1:  # their order counts: one undoes what another decides
        _decide(terms, {}, Axis.LAYOUT)
    return composed


def _layout_changes(layout: Mapping[str, Any]) -> dict[str, Any]:
    layout = current_keys(mapping(layout, "layout"), LAYOUT_FIELDS, "layout")
    if unknown := sorted(layout.keys() - LAYOUT_FIELDS.keys(), key=str):
        known = ", ".join(LAYOUT_FIELDS)
        raise ValueError(f"layout: cannot set '{unknown[0]}' of a method; known: {known}")
    return layout


def _choose(axis: Axis, choice: Any) -> Any:
    registry = TABLES[axis]
    if isinstance(choice, str):
        return registry.build(choice)
    if choice is None or isinstance(choice, _BASES[axis]):
        return choice
    items = list(choice.items()) if isinstance(choice, Mapping) else []
    if len(items) != 1 or not isinstance(items[0][1], Mapping | None):
        raise ValueError(
            f"a {registry.what} is written as {{name: {{parameter: value}}}}, got {choice!r:.60}"
        )
    [(name, parameters)] = items
    return registry.build(str(name), **{str(key): v for key, v in (parameters or {}).items()})


def format_method(terms: tuple[Method, ...], given: Mapping[Axis, Any]) -> str:
    """Writes a composition of ``terms``, with the ``given`` axis values, as on the command line."""
    # The name of a nested composition already has its parameters.
    parts = [
        _format_entry(term.name, term) if METHODS.name_of(term) == term.name else term.name
        for term in terms
    ]
    if Axis.LAYOUT in given:
        parts.append(" ".join(["layout", *(_pair(k, v) for k, v in given[Axis.LAYOUT].items())]))
    for axis, table in TABLES.items():
        if axis in given:
            value = given[axis]
            none = "nothing" if axis is Axis.SELECT else f"no {table.what}"
            parts.append(_format_entry(table.name_of(value), value) if value else none)
    return " + ".join(parts)


def _format_entry(name: str, entry: Any) -> str:
    values = [(f.name, f.default, getattr(entry, f.name)) for f in fields(entry)]
    changed = [(n, v) for n, default, v in values if default is not MISSING and v != default]
    return " ".join([name, *(_pair(*pair) for pair in changed)])


def _pair(key: str, value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n...\n")
    return f"{key}={''.join(text.split())}"


def _decide(terms: tuple[Method, ...], given: Mapping[Axis, Any], axis: Axis) -> Any:
    """The value of an axis that at most one preset may decide, unless it is given."""
    if axis in given:
        return given[axis]
    deciders = [term for term in terms if axis in term.axes]
    if len(deciders) > 1:
        names = " and ".join(f"'{term.name}'" for term in deciders)
        raise ValueError(
            f"{names} both decide the axis '{axis.value}'; drop one, or choose {axis.value}=..."
        )
    return getattr([*deciders, terms[0]][0], axis.value)()


def _weights(terms: tuple[Method, ...]) -> Weights:
    for term in terms:
        if term.cached is not Cached.CHUNKS:
            raise ValueError(
                f"'{term.name}' takes no chunk from a cache and cannot be composed; start from one "
                "that does, such as 'naive'"
            )
    needed = {term.weights for term in terms} - {Weights.ANY}
    if len(needed) > 1:
        wanted = " and ".join(sorted(f"'{weights.value}'" for weights in needed))
        raise ValueError(f"one model cannot be trained for {wanted} at once; drop one preset")
    return next(iter(needed), Weights.ANY)
