"""A reuse method as a choice on independent axes, and the table of the named ones.

Place and Encode are fields of the prompt's `LayoutSpec` (where chunks stand; what they are encoded
after), Select is a `Selection`, and Weights says what the model must have been trained for. A
published method is one file in ``presets/`` that makes these choices.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from abc import ABC
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any, ClassVar, NamedTuple

from blocktune.prompt import LayoutSpec
from blocktune.select import Nothing, Selection


class Cached(Enum):
    """What a method takes from caches instead of computing it."""

    NOTHING = "nothing"
    EXACT_PREFIX = "exact prefix"
    CHUNKS = "chunks"


class Weights(Enum):
    """What a model must have been trained for, for the method to mean what its paper means."""

    ANY = "any"
    BLOCK = "block attention"
    LINKS = "link tokens"


@dataclass(frozen=True)
class Method(ABC):
    """A composition. Subclasses are presets: their fields, all with defaults, are their YAML keys.

    Class attributes:
        source: Paper or code it follows.
        weights: What the model must be trained for.
        cached: What comes from caches.
        keeps_context: False only for the baseline that answers without chunks.
        exact_on_one_chunk: Whether one chunk with nothing before it equals full prefill.
    """

    source: ClassVar[str]
    weights: ClassVar[Weights] = Weights.ANY
    cached: ClassVar[Cached] = Cached.CHUNKS
    keeps_context: ClassVar[bool] = True
    exact_on_one_chunk: ClassVar[bool] = True

    def layout(self, trained: LayoutSpec | None) -> LayoutSpec:
        """Place and Encode: how the prompt's rows are laid out.

        Args:
            trained: The layout that the model's adapter was trained for, or None without one.

        Raises:
            ValueError: If the method needs an adapter that this is not.
        """
        self.require(trained)
        return trained or LayoutSpec()

    def selection(self) -> Selection:
        """Select: which tokens are computed afresh."""
        return Nothing()

    def require(self, trained: LayoutSpec | None) -> None:
        """Refuses weights that the method does not stand for.

        Raises:
            ValueError: Saying what adapter is wanted.
        """
        is_block = trained is not None and trained.block
        has_links = is_block and trained.num_links > 0
        if self.weights is Weights.BLOCK and (not is_block or has_links):
            came = "one with link tokens (use 'kvlink')" if has_links else "none"
            raise ValueError(
                f"method '{name_of(self)}' needs an adapter trained with block attention, got "
                f"{came}; train one with recipes/block_attention.yaml and pass --adapter"
            )
        if self.weights is Weights.LINKS and not has_links:
            raise ValueError(
                f"method '{name_of(self)}' needs an adapter trained with link tokens, got "
                f"{'one without' if is_block else 'none'}; train one with recipes/kvlink.yaml and "
                "pass --adapter"
            )


_METHODS: dict[str, type[Method]] = {}


def register(name: str):
    """Enters a preset into the table of methods under its published name.

    Raises:
        ValueError: If the name is taken.
    """

    def enter(cls: type[Method]) -> type[Method]:
        taken = _METHODS.get(name)
        # A module imported anew (a reload, a plug-in found twice) may replace its own entry.
        if taken is not None and taken.__qualname__ != cls.__qualname__:
            raise ValueError(f"reuse method '{name}' is already taken by {taken.__qualname__}")
        _METHODS[name] = cls
        return cls

    return enter


def _table() -> dict[str, type[Method]]:
    """All presets; importing the package's modules is what finds them."""
    from blocktune.reuse import presets

    for module in pkgutil.iter_modules(presets.__path__):
        importlib.import_module(f"{presets.__name__}.{module.name}")
    return _METHODS


def available() -> list[str]:
    """Names of all methods, sorted."""
    return sorted(_table())


def build(name: str, **parameters: Any) -> Method:
    """Builds a method from a YAML entry such as ``{name: epic, k: 8}``.

    Raises:
        ValueError: If the name or a parameter is unknown, or a value is out of range.
    """
    if name not in _table():
        raise ValueError(f"unknown reuse method '{name}'; available: {', '.join(available())}")
    cls = _METHODS[name]
    known = [field.name for field in fields(cls)]
    if unknown := sorted(parameters.keys() - set(known)):
        takes = f"takes {', '.join(known)}" if known else "takes no parameters"
        raise ValueError(f"reuse method '{name}' {takes}, got unknown {', '.join(unknown)}")
    method = cls(**parameters)
    method.selection()  # a value out of range is refused here, not in the middle of a run
    return method


def name_of(method: Method) -> str:
    """The name a method is registered under."""
    return next((n for n, cls in _METHODS.items() if cls is type(method)), type(method).__name__)


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
    method = build(name)
    summary = inspect.getdoc(type(method)).splitlines()[0]
    parameters = {field.name: getattr(method, field.name) for field in fields(method)}
    return Description(name, summary, method.weights.value, parameters, method.source)
