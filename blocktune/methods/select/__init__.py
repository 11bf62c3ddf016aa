"""Selectors: which context tokens are recomputed. Tensors in, row mask out."""

from blocktune.lazy import exports

_SELECT = "blocktune.methods.select"
__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        f"{_SELECT}.base": "SELECTORS Everything LayerCheck LayerKV Nothing Passes QueryScores "
        "Selection Truth selectable",
        f"{_SELECT}.budget": "matched takes_budget top_by_chunk top_count top_of_context top_share",
        f"{_SELECT}.layers": "ChunkProbes Deviation GradualDeviation LayerRange Reselect distance",
        f"{_SELECT}.tokens": "AttentionDeviation AuxiliaryAttention FirstK Oracle QueryAttention "
        "Random Recency Scored",
    },
)
