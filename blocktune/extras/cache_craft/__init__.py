"""Cache-Craft: chunks from earlier full prefills, and statistics that decide what to recompute."""

from blocktune.extras.cache_craft.method import CacheCraft, StoredContext, VariantHistory

__all__ = ["CacheCraft", "StoredContext", "VariantHistory"]
