"""Cache-Craft: chunks from earlier full prompts, and statistics that say what to recompute."""

from blocktune.extras.cache_craft.method import CacheCraft, StoredContext, VariantHistory
from blocktune.extras.cache_craft.variants import Variant, VariantStore, cache_fix_overhead

__all__ = [
    "CacheCraft",
    "StoredContext",
    "Variant",
    "VariantHistory",
    "VariantStore",
    "cache_fix_overhead",
]
