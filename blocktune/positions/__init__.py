"""Where chunks stand, and how cached keys are moved there."""

from blocktune.positions.placement import PLACEMENTS, Placement, place
from blocktune.positions.relocation import RopeSpec, Rotation, relocate_keys, rotate_keys

__all__ = [
    "PLACEMENTS",
    "Placement",
    "RopeSpec",
    "Rotation",
    "place",
    "relocate_keys",
    "rotate_keys",
]
