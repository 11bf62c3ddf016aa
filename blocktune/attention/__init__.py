"""One rule of visibility, its executions, and how stock models are told to use them."""

from blocktune.attention.dense import DensePlan, dense_mask
from blocktune.attention.flex import FlexPlan
from blocktune.attention.interface import NAME, Plan, attach, detach, make_plan
from blocktune.attention.split import SplitPlan

__all__ = [
    "NAME",
    "DensePlan",
    "FlexPlan",
    "Plan",
    "SplitPlan",
    "attach",
    "dense_mask",
    "detach",
    "make_plan",
]
