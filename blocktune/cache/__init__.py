"""Everything that is kept between requests or passes: chunks, exact prefixes, prompts."""

from blocktune.lazy import exports

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "blocktune.cache.chunk_kv": "ChunkKV ChunkStates Entry",
        "blocktune.cache.fingerprint": "chunk_key key_after model_fingerprint states_key "
        "stored_key weights_hash",
        "blocktune.cache.exact": "ExactKV cut_exact",
        "blocktune.cache.prefill_cache": "PrefillCache",
        "blocktune.cache.prefix_tree": "PrefixMatch PrefixTree",
        "blocktune.cache.row_cache": "SKIP RowCache",
        "blocktune.cache.store": "ChunkStore Lookup StoreStats",
    },
)
