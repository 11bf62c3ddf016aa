"""Where chunks stand, and how cached keys are moved there."""

from blocktune.positions.placement import PLACEMENTS, Placement, place
from blocktune.positions.rope import FIXED_ROPE_TYPES, RopeSpec, Turn, relocate_keys, turn_keys

__all__ = [
    "FIXED_ROPE_TYPES",
    "PLACEMENTS",
    "Placement",
    "RopeSpec",
    "Turn",
    "place",
    "relocate_keys",
    "turn_keys",
]
