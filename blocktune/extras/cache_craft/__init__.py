"""Cache-Craft: chunks from earlier full prompts, and statistics that say what to recompute."""

from blocktune.extras.cache_craft.method import CacheCraft, StoredContext, VariantHistory

__all__ = ["CacheCraft", "StoredContext", "VariantHistory"]
