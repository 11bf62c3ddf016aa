"""Reuse methods: presets of published systems, their axes, and how to compose and add them.

A plug-in imports everything it needs from here::

    from blocktune.methods import FirstK, Method, Selection, register
"""

from blocktune.lazy import exports
from blocktune.methods import select

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "blocktune.methods.base": "BOTH_LEARNED Axis Cached ChunkLoader DamagedChunk Method "
        "PrefilledBatch PromptHistory ServedModel Weights available register",
        "blocktune.methods.composition": "Composition compose format_method",
        "blocktune.methods.describe": "describe_all describe_method",
        "blocktune.methods.method_parser": "build build_entry default_method parse_method",
        "blocktune.methods.repair": "MeanShift REPAIRS Repair Residual",
        "blocktune.methods.reshape": "RESHAPES Reshape ScaledContext Seen TopChunks in_chunk",
        "blocktune.methods.select": " ".join(select.__all__),
        "blocktune.registry": "require_count require_one_of require_share",
    },
)
