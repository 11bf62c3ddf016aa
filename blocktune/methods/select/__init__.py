"""Which context tokens are computed afresh: one selector a file, tensors in, row mask out."""

from blocktune.methods.registry import SELECTORS
from blocktune.methods.select.base import Everything, Nothing, Scored, Selection, selectable
from blocktune.methods.select.bounds import Oracle, Random
from blocktune.methods.select.budget import matched, takes_budget, top_share
from blocktune.methods.select.deviation import Deviation, GradualDeviation, deviation, distance
from blocktune.methods.select.first_k import FirstK
from blocktune.methods.select.layer_check import LayerCheck, LayerKV
from blocktune.methods.select.layers import LayerRange, Reselect
from blocktune.methods.select.passes import Passes, Truth
from blocktune.methods.select.query_attention import AuxiliaryAttention, QueryAttention
from blocktune.methods.select.reconstruction import AttentionDeviation, Recency

__all__ = [
    "SELECTORS",
    "AttentionDeviation",
    "AuxiliaryAttention",
    "Deviation",
    "Everything",
    "FirstK",
    "GradualDeviation",
    "LayerCheck",
    "LayerKV",
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
    "Stored",
    "Truth",
    "deviation",
    "distance",
    "matched",
    "selectable",
    "takes_budget",
    "top_share",
]
