"""Everything that is kept between requests or passes: chunks, exact prefixes, prompts."""

from blocktune.cache.chunk_kv import ChunkKV
from blocktune.cache.exact import ExactKV, cut_exact
from blocktune.cache.fingerprint import chunk_key, model_fingerprint, weights_hash
from blocktune.cache.prefix_tree import PrefixMatch, PrefixTree
from blocktune.cache.prompt_cache import RowCache
from blocktune.cache.row_layer import SKIP
from blocktune.cache.store import ChunkStore, Lookup, StoreStats

__all__ = [
    "SKIP",
    "ChunkKV",
    "ChunkStore",
    "ExactKV",
    "Lookup",
    "PrefixMatch",
    "PrefixTree",
    "RowCache",
    "StoreStats",
    "chunk_key",
    "cut_exact",
    "model_fingerprint",
    "weights_hash",
]
