"""Arithmetic of a model, counted from its modules and from what was executed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from blocktune.attention.cached import CachePlan
from blocktune.engine.layers import decoder_layers
from blocktune.layout import Kind

OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj")
"""Names of the projection after attention; an attention module's other ones come before it."""


@dataclass(frozen=True)
class LayerCost:
    """Multiply-adds of one layer.

    Attributes:
        row: Of its matrices, per row; of a mixture of experts, those that a row is sent to.
        probe: Of the projections that make keys and values (and queries), per row.
        pair: Of attention, per row and key: the score and the weighted value.
    """

    row: int
    probe: int
    pair: int


@dataclass(frozen=True)
class ModelCost:
    """Multiply-adds of a model.

    Attributes:
        layers: By layer.
        head: Of the language-model head, per row.
    """

    layers: tuple[LayerCost, ...]
    head: int

    @classmethod
    def of(cls, model: nn.Module) -> ModelCost:
        """Reads the model's modules. Norms, activations and rotations are left out."""
        config = model.config.get_text_config()
        experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
        share = config.num_experts_per_tok / experts if experts else 1.0
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        pair = 2 * config.num_attention_heads * dim
        layers = tuple(_layer_cost(layer, share, pair) for layer in decoder_layers(model))
        return cls(layers, config.hidden_size * config.vocab_size)


@dataclass
class Executed:
    """What one pass of a model computed, for `flops`.

    Attributes:
        model: The one that ran; its modules are only counted when somebody asks.
        plans: Attention plans, which say in which layers they ran.
        probes: Plans whose rows' keys and values a layer made for a choice only, by layer.
        heads: Rows of each prompt that went through the head.
        extra: Multiply-adds besides, per prompt, ``(B,)``.
    """

    model: nn.Module
    plans: list[CachePlan] = field(default_factory=list)
    probes: Mapping[int, CachePlan] = field(default_factory=dict)
    heads: int = 1
    extra: Tensor | None = None

    def flops(self) -> Tensor:
        """Floating-point operations of each prompt, two per multiply-add, ``(B,)`` int64.

        Rows that pad a batch are nobody's; scores that a mask hides are made, and counted.
        """
        model = ModelCost.of(self.model)
        macs = model.head * self.heads + (0 if self.extra is None else self.extra)
        for plan in self.plans:
            rows = _rows(plan)
            for layer, pairs in zip(plan.executed, plan.pairs(), strict=True):
                cost = model.layers[layer]
                macs = macs + rows * cost.row + pairs.cpu() * cost.pair
        for layer, plan in self.probes.items():
            macs = macs + _rows(plan) * model.layers[layer].probe
        return 2 * macs


def _rows(plan: CachePlan) -> Tensor:
    return (plan.query.kind != Kind.PAD).sum(1).cpu()


def _layer_cost(layer: nn.Module, share: float, pair: int) -> LayerCost:
    matrices = dict(_matrices(layer, share))
    attention = {name: macs for name, macs in matrices.items() if "attn" in name}
    before = sum(m for name, m in attention.items() if not set(name.split(".")) & set(OUTPUTS))
    return LayerCost(sum(matrices.values()), before, pair)


def _matrices(layer: nn.Module, share: float) -> Iterator[tuple[str, int]]:
    """Multiply-adds per row of each matrix of a layer, by module; ``share`` of the experts'."""
    for name, module in layer.named_modules():
        one = share if "experts." in name else 1.0
        if isinstance(module, nn.Linear):  # also quantised ones, whose weights have other shapes
            yield name, round(module.in_features * module.out_features * one)
            continue
        own = dict(module.named_parameters(recurse=False)).values()
        stacked = sum(p.numel() for p in own if p.ndim == 3)  # all experts in one parameter
        plain = sum(p.numel() for p in own if p.ndim == 2)  # a router
        if stacked or plain:
            yield name, plain + round(stacked * share)
