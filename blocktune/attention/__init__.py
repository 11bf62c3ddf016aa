"""One rule of visibility, its executions, and how stock models are told to use them."""

from blocktune.lazy import exports

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "blocktune.attention.masks": "DensePlan dense_mask",
        "blocktune.attention.flex": "FlexPlan",
        "blocktune.attention.interface": "Plan attach block_attention detach is_attached make_plan "
        "planned_forward written_rows",
        "blocktune.attention.split": "SplitPlan",
    },
)
