"""The serving engine: encode chunks, assemble caches, prefill, decode, and account the cost."""

from blocktune.lazy import exports

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "blocktune.engine.context_cache": "CachedContext",
        "blocktune.engine.encode": "EncodeReport",
        "blocktune.engine.engine": "Engine",
        "blocktune.engine.generation": "Answer Sampling",
        "blocktune.engine.prompts": "Request",
        "blocktune.engine.usage": "Ttft Usage",
    },
)
