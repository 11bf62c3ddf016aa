"""Which context tokens are computed afresh: one selector a file, tensors in, row mask out."""

from blocktune.select.base import Everything, Nothing, Selection
from blocktune.select.budget import top_share
from blocktune.select.deviation import KeyDeviation, key_deviation
from blocktune.select.first_k import FirstK

__all__ = [
    "Everything",
    "FirstK",
    "KeyDeviation",
    "Nothing",
    "Selection",
    "key_deviation",
    "top_share",
]
