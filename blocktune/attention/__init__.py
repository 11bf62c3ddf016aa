"""Attention by a layout: several executions of one visibility rule, attached to stock models."""

from blocktune.lazy import exports

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "blocktune.attention.masks": "DensePlan dense_mask",
        "blocktune.attention.flex": "FlexPlan",
        "blocktune.attention.interface": "Plan attach block_attention detach is_attached make_plan "
        "planned_forward",
        "blocktune.attention.split": "SplitPlan",
    },
)
