"""Training and evaluation data: sources, examples and mixtures."""

from blocktune.lazy import exports

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "blocktune.data.chunking": "build_chunker",
        "blocktune.data.example": "RagExample write_jsonl",
        "blocktune.data.mixture": "Augment Mixture load_mixture mix",
        "blocktune.data.sources.load": "load_chunks load_examples",
    },
)
