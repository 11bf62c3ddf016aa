"""Everything that is kept between requests or passes: chunks, exact prefixes, prompts."""

from blocktune.cache.chunk_kv import ChunkKV, ChunkStates, Entry
from blocktune.cache.exact import ExactKV, cut_exact, load_exact
from blocktune.cache.fingerprint import (
    chunk_key,
    key_after,
    model_fingerprint,
    states_key,
    weights_hash,
)
from blocktune.cache.prefix_tree import PrefixMatch, PrefixTree
from blocktune.cache.row_cache import SKIP, RowCache
from blocktune.cache.store import ChunkStore, Lookup, StoreStats

__all__ = [
    "SKIP",
    "ChunkKV",
    "ChunkStates",
    "ChunkStore",
    "Entry",
    "ExactKV",
    "Lookup",
    "PrefixMatch",
    "PrefixTree",
    "RowCache",
    "StoreStats",
    "chunk_key",
    "cut_exact",
    "key_after",
    "load_exact",
    "model_fingerprint",
    "states_key",
    "weights_hash",
]
