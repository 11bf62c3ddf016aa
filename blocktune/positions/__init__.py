"""Where chunks are placed, and how cached keys are moved there."""

from blocktune.lazy import exports

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "blocktune.positions.placement": "PLACEMENTS Placement place",
        "blocktune.positions.relocation": "LayerRope RopeSpec Rotation load_fused relocate_keys "
        "rotate_keys",
    },
)
