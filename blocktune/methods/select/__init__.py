"""Select: which context tokens are recomputed. One idea a file; tensors in, row mask out."""

from blocktune.lazy import exports

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "blocktune.methods.registry": ("SELECTORS",),
        "blocktune.methods.select.attention": (
            "AttentionDeviation",
            "AuxiliaryAttention",
            "QueryAttention",
        ),
        "blocktune.methods.select.base": (
            "Everything",
            "Nothing",
            "Scored",
            "Selection",
            "selectable",
        ),
        "blocktune.methods.select.bounds": ("Oracle", "Random"),
        "blocktune.methods.select.budget": (
            "matched",
            "require_layer",
            "require_share",
            "takes_budget",
            "top_count",
            "top_of_context",
            "top_share",
        ),
        "blocktune.methods.select.deviation": ("Deviation", "GradualDeviation", "distance"),
        "blocktune.methods.select.layer_check": ("LayerCheck", "LayerKV"),
        "blocktune.methods.select.layers": ("LayerRange", "Reselect"),
        "blocktune.methods.select.passes": ("Passes", "Truth"),
        "blocktune.methods.select.place": ("FirstK", "Recency"),
    },
)
