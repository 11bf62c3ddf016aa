"""Caches that outlive a request or a forward pass: chunks, exact prefixes, prompts."""

from blocktune.lazy import exports

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "blocktune.cache.chunk_kv": "ChunkKV ChunkStates Entry Lookup",
        "blocktune.cache.store.fingerprint": "chunk_key key_after model_fingerprint stored_key "
        "weights_hash",
        "blocktune.cache.store.blobs": "states_key",
        "blocktune.cache.exact": "ExactKV PrefixMatch cut_exact",
        "blocktune.cache.prefix_tree": "PrefixTree",
        "blocktune.cache.row_cache": "SKIP PrefillCache RowCache",
        "blocktune.cache.store.config": "StoreStats TierStats",
        "blocktune.cache.store.chunk_store": "ChunkStore",
    },
)
