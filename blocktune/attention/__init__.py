"""One rule of visibility, its executions, and how stock models are told to use them."""

from blocktune.attention.dense import DensePlan, dense_mask
from blocktune.attention.flex import FlexPlan
from blocktune.attention.interface import (
    Plan,
    attach,
    block_attention,
    detach,
    is_attached,
    make_plan,
)
from blocktune.attention.split import SplitPlan

__all__ = [
    "DensePlan",
    "FlexPlan",
    "Plan",
    "SplitPlan",
    "attach",
    "block_attention",
    "dense_mask",
    "detach",
    "is_attached",
    "make_plan",
]
