"""Which context tokens are computed afresh: one selector a file, tensors in, row mask out."""

from blocktune.select.auxiliary import AuxiliaryAttention
from blocktune.select.base import Everything, Nothing, Scored, Selection, selectable
from blocktune.select.bounds import Oracle, Random
from blocktune.select.budget import matched, takes_budget, top_share
from blocktune.select.check import Check, States
from blocktune.select.deviation import Deviation, deviation, distance
from blocktune.select.first_k import FirstK
from blocktune.select.gradual import GradualDeviation
from blocktune.select.layer_range import LayerRange
from blocktune.select.passes import Passes, Stored, Truth
from blocktune.select.query_attention import QueryAttention
from blocktune.select.reconstruction import AttentionDeviation, Recency
from blocktune.select.registry import SELECTORS
from blocktune.select.reselect import Reselect
from blocktune.select.stored_context import StoredContext

__all__ = [
    "SELECTORS",
    "AttentionDeviation",
    "AuxiliaryAttention",
    "Check",
    "Deviation",
    "Everything",
    "FirstK",
    "GradualDeviation",
    "LayerRange",
    "Nothing",
    "Oracle",
    "Passes",
    "QueryAttention",
    "Random",
    "Recency",
    "Reselect",
    "Scored",
    "Selection",
    "States",
    "Stored",
    "StoredContext",
    "Truth",
    "deviation",
    "distance",
    "matched",
    "selectable",
    "takes_budget",
    "top_share",
]
