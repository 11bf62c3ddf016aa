"""Positions of chunks in a prompt, and relocation of cached keys to them."""

from blocktune.lazy import exports

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "blocktune.positions.placement": "PLACEMENTS place",
        "blocktune.positions.relocation": "LayerRope RopeSpec Rotation load_fused relocate_keys "
        "rotate_keys",
    },
)
