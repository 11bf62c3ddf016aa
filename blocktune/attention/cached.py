"""Attention of computed rows over a cache that holds all columns of the prompt."""

from __future__ import annotations

import torch
from torch import Tensor

from blocktune.attention.kernels import Knobs, causal_attention
from blocktune.attention.rows import RowBand
from blocktune.layout import Kind, LayerRule, Rows


class CachePlan:
    """The serving side of the rule: some rows are computed, the others' keys are in the cache.

    A fresh row has written over its original's column by the time anybody attends, so what the
    columns hold is always what a global row may see; the rest (order, window, padding) is the
    rule's. The plan counts what it executes: the account of an answer reads it here.

    Attributes:
        query: Facts of the computed rows, ``(B, R)``.
        context_rows: Rows of chunk tokens among the query rows, per prompt, ``(B,)``.
        executed: Layers whose attention ran with this plan, in order.
    """

    def __init__(self, query: Rows, key: Rows):
        """Prepares ``query`` ``(B, R)`` over the columns ``key`` ``(B, N)``, by order."""
        self.query = query
        self.context_rows = (query.kind == Kind.CHUNK).sum(1)
        self.executed: list[int] = []
        exists, stored = query.kind != Kind.PAD, key.kind != Kind.PAD
        self._band = RowBand(query, key, torch.zeros_like(key.kind), exists, stored)
        # All columns computed at once (a full prefill) is the plain causal triangle.
        self._causal = query.order.shape == key.order.shape and bool(
            exists.all() and stored.all() and (query.order == key.order).all()
        )

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, rule: LayerRule, knobs: Knobs
    ) -> Tensor:
        """See `Plan.attend`; rows end by not being computed, so the layer itself is no matter."""
        self.executed.append(rule.layer)
        if self._causal and (rule.window is None or rule.window >= key.shape[2]):
            return causal_attention(query, key, value, knobs).transpose(1, 2)
        rule = LayerRule(window=rule.window)
        return self._band.attend(query, key, value, rule, knobs).transpose(1, 2)
