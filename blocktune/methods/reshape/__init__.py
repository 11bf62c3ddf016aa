"""Reshapes: how later rows attend to reused keys. Scores in, scores out."""

from blocktune.lazy import exports

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "blocktune.methods.reshape.base": "RESHAPES Reshape Seen in_chunk",
        "blocktune.methods.reshape.scaled_context": "ScaledContext",
        "blocktune.methods.reshape.top_chunks": "TopChunks",
    },
)
