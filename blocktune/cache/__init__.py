"""Everything that is kept between requests or passes: chunks, exact prefixes, prompts."""

from blocktune.cache.chunk_kv import ChunkKV
from blocktune.cache.craft import cache_fix_overhead
from blocktune.cache.entry import Entry
from blocktune.cache.exact import ExactKV, cut_exact
from blocktune.cache.fingerprint import chunk_key, key_after, model_fingerprint, weights_hash
from blocktune.cache.lookup import Lookup, StoreStats
from blocktune.cache.prefix_tree import PrefixMatch, PrefixTree
from blocktune.cache.prompt_cache import RowCache
from blocktune.cache.row_layer import SKIP
from blocktune.cache.states import ChunkStates, states_key
from blocktune.cache.store import ChunkStore
from blocktune.cache.streaming import Damaged, Stream
from blocktune.cache.variant_store import Recall, VariantStore
from blocktune.cache.variants import ChunkVariants, Variant

__all__ = [
    "SKIP",
    "ChunkKV",
    "ChunkStates",
    "ChunkStore",
    "ChunkVariants",
    "Damaged",
    "Entry",
    "ExactKV",
    "Lookup",
    "PrefixMatch",
    "PrefixTree",
    "Recall",
    "RowCache",
    "StoreStats",
    "Stream",
    "Variant",
    "VariantStore",
    "cache_fix_overhead",
    "chunk_key",
    "cut_exact",
    "key_after",
    "model_fingerprint",
    "states_key",
    "weights_hash",
]
