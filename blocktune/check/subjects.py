"""Everything that the contract holds for, found by discovery: presets and values of each axis."""

from __future__ import annotations

from blocktune.positions import PLACEMENTS
from blocktune.prompt.spec import BOS
from blocktune.reshape import RESHAPES
from blocktune.reuse import Method, available, build, compose
from blocktune.select import SELECTORS

SLOT = 64
"""Positions of a reserved slot, enough for the chunks of the requests."""
LAYOUTS = (
    *({"placement": name} | ({"slot": SLOT} if name == "reserved" else {}) for name in PLACEMENTS),
    *({"bos": name} for name in BOS),
    {"num_ghosts": 3},
    {"shared_prefix": True},
)
"""One layout for each value of Place and Encode."""


def subjects() -> dict[str, Method]:
    """All presets with their defaults, and all values of the axes over plain reuse, by name."""
    return {name: build(name) for name in available()} | axis_values()


def axis_values() -> dict[str, Method]:
    """Plain reuse with one axis decided, for every value that is known, by what one says."""
    made = [compose("naive", select=name) for name in SELECTORS.available()]
    made += [compose("naive", reshape=name) for name in RESHAPES.available()]
    made += [compose("naive", layout=layout) for layout in LAYOUTS]
    return {method.name: method for method in made}
