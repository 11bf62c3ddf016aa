"""How a stock transformers model is told to attend by a layout.

`attach` switches the model to an attention function registered through transformers' own
interface. Each forward then takes a *plan*: the execution that was prepared for its layout.
No model code is forked or patched, and importing this module changes nothing.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from blocktune.attention.dense import DensePlan
from blocktune.attention.flex import FlexPlan
from blocktune.attention.kernels import AttentionParams
from blocktune.attention.split import SplitPlan
from blocktune.layout import LayerRule, Layout

NAME = "blocktune"
"""The attention implementation's name in transformers."""


class Plan(Protocol):
    """An execution of the visibility rule, prepared once per batch and used by all layers."""

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, rule: LayerRule, params: AttentionParams
    ) -> Tensor:
        """Attends by the layout the plan was made for.

        Args:
            query: ``(B, H, R, D)``.
            key: ``(B, K, N, D)``.
            value: ``(B, K, N, D)``.
            rule: The layer's part of the rule.
            params: Scaling, soft-capping and dropout.

        Returns:
            ``(B, R, H, D)``, as transformers wants it.
        """


EXECUTIONS = {"dense": DensePlan, "flex": FlexPlan, "split": SplitPlan}


def make_plan(execution: str, layout: Layout) -> Plan:
    """Prepares an execution of ``layout``.

    Args:
        execution: ``split`` (CPU and CUDA, forward and backward), ``flex`` (CUDA; forward only
            on CPU) or ``dense`` (the N x N oracle).
        layout: Rows ``(B, S)``, on the model's device.

    Raises:
        ValueError: If the execution is unknown.
    """
    if execution not in EXECUTIONS:
        known = ", ".join(sorted(EXECUTIONS))
        raise ValueError(f"unknown attention execution '{execution}'; available: {known}")
    return EXECUTIONS[execution](layout)


def attach(model: PreTrainedModel) -> None:
    """Switches ``model`` (or the base model under a PEFT wrapper) to attention by plan.

    Every later forward needs ``plan=``; without one it raises instead of attending causally in
    silence. `detach` undoes it.

    Raises:
        ValueError: If the model cannot switch its attention implementation.
    """
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, _no_mask)
    model.set_attn_implementation(NAME)
    if model.config.get_text_config()._attn_implementation != NAME:
        raise ValueError(
            f"{type(model).__name__} does not take transformers' attention interface; "
            "blocktune needs a model whose attention can be switched by set_attn_implementation"
        )


def detach(model: PreTrainedModel) -> None:
    """Gives ``model`` back its own attention: PyTorch's, or eager where it has none (Gemma 2)."""
    model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")


def _no_mask(*args, **kwargs) -> None:
    """The plan holds the mask."""


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    plan: Plan | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """The registered attention function."""
    if plan is None:
        raise ValueError(
            "this model attends by a blocktune plan and got none; pass plan=make_plan('split', "
            "layout) to forward, or blocktune.attention.detach(model) to go back"
        )
    if attention_mask is not None:
        raise ValueError(
            f"a plan and an attention mask {tuple(attention_mask.shape)} were given; the plan's "
            "layout holds all visibility (padding too): leave attention_mask out"
        )
    if kwargs.get("s_aux") is not None or kwargs.get("position_bias") is not None:
        raise ValueError(
            f"{type(module).__name__} adds attention sinks or a position bias to its scores; "
            "blocktune supports RoPE decoders with plain softmax attention"
        )
    rule = LayerRule(layer=module.layer_idx, window=sliding_window)
    return plan.attend(query, key, value, rule, AttentionParams(scaling, softcap, dropout)), None
