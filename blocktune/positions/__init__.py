"""Where chunks stand, and how cached keys are moved there."""

from blocktune.positions.placement import PLACEMENTS, Placement, place
from blocktune.positions.rope import FIXED_ROPE_TYPES, RopeSpec, relocate_keys

__all__ = ["FIXED_ROPE_TYPES", "PLACEMENTS", "Placement", "RopeSpec", "place", "relocate_keys"]
