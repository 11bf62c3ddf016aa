"""Repairs: reused keys and values are corrected without being computed. Tensors in and out."""

from blocktune.lazy import exports

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "blocktune.methods.repair.base": "REPAIRS Repair Residual",
        "blocktune.methods.repair.mean_shift": "MeanShift",
    },
)
