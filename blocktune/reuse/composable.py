"""What can be composed with what."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from blocktune.reuse.base import Axis, Cached, Method, Weights

PLACE_AND_ENCODE = ("placement", "slot", "num_ghosts", "shared_prefix", "bos")
"""Fields of `LayoutSpec` that a method chooses; the others are facts of what was trained."""


def require_fields(layout: Mapping[str, Any]) -> None:
    """Refuses fields of a layout that no method chooses.

    Raises:
        ValueError: If there is one.
    """
    if unknown := sorted(layout.keys() - set(PLACE_AND_ENCODE)):
        known = ", ".join(PLACE_AND_ENCODE)
        raise ValueError(f"layout: cannot set '{unknown[0]}' of a method; known: {known}")


def require_composable(terms: tuple[Method, ...]) -> None:
    """Refuses presets that cannot stand together.

    Raises:
        ValueError: If one takes nothing from chunk caches, or they need different weights.
    """
    for term in terms:
        if term.cached in (Cached.NOTHING, Cached.EXACT_PREFIX):
            raise ValueError(
                f"'{term.name}' takes no chunk from a cache, so there is nothing to compose it "
                "with; start from a method that does, such as 'naive'"
            )
    if len(wants := needs(terms)) > 1:
        wanted = " and ".join(sorted(f"'{need.value}'" for need in wants))
        raise ValueError(f"one model cannot be trained for {wanted} at once; drop one preset")


def needs(terms: tuple[Method, ...]) -> set[Weights]:
    """What the model must be trained for, by any of the presets."""
    return {term.weights for term in terms} - {Weights.ANY}


def require_one_each(terms: tuple[Method, ...], given: Mapping[Axis, Any]) -> None:
    """Refuses an axis that two presets decide, unless it is given.

    Layouts add up: each preset changes what the one before it left.

    Raises:
        ValueError: Naming both.
    """
    for axis in set(Axis) - set(given) - {Axis.LAYOUT}:
        deciders = [f"'{term.name}'" for term in terms if axis in term.axes]
        if len(deciders) > 1:
            raise ValueError(
                f"{' and '.join(deciders)} both decide the axis '{axis.name.lower()}'; drop one, "
                f"or say which: compose(..., {axis.name.lower()}=...)"
            )
