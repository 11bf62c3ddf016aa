"""Makes stock transformers models attend by a layout, through transformers' own interface."""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from blocktune.attention.flex import FlexPlan
from blocktune.attention.kernels import AttentionParams
from blocktune.attention.masks import DensePlan
from blocktune.attention.split import SplitPlan
from blocktune.layout import LayerRule, Layout
from blocktune.registry import require_one_of

NAME = "blocktune_"  # prefix of registered attention implementations, before the stock name
STOCK = ("sdpa", "eager")  # implementations that run if a forward pass has no layout
OWN_ATTENTION = (
    "{} computes attention in its own code, to which blocktune's masks do not apply; use a decoder "
    "that attends by transformers' attention interface"
)
_HANDLE = "_blocktune_attached"  # attribute of a decoder: its execution, and the handle of its hook
ATTACHED: WeakSet[nn.Module] = WeakSet()  # the attached decoders of this process


class Plan(Protocol):
    """An execution of the visibility rule, prepared once per batch and used by all layers.

    One made from a layout has ``written`` (`Layout.written`), a wrapping one has ``plan``.
    """

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, rule: LayerRule, params: AttentionParams
    ) -> Tensor:
        """Attends ``query`` ``(B, H, R, D)`` over ``key`` and ``value`` ``(B, K, N, D)``.

        ``rule`` is the layer's part of the visibility rule. Returns ``(B, R, H, D)``.
        """


def written_rows(kwargs: Mapping[str, Any]) -> Tensor | None:
    """Rows that encode chunks (`Layout.written`), by a layer's ``kwargs``; None: there are none."""
    # Some layers (StableLM, Nemotron) pass only the attention mask on, so it carries the plan, too.
    plan = kwargs.get("plan") or getattr(kwargs.get("attention_mask"), "plan", None)
    while (inner := getattr(plan, "plan", None)) is not None:
        plan = inner
    return getattr(plan, "written", None)


CACHE_ARGUMENTS = ("cache", "past_key_values", "cache_params")  # the first since transformers 5.24
EXECUTIONS = {"dense": DensePlan, "flex": FlexPlan, "split": SplitPlan}
_run = torch.compiler.disable(lambda plan, *inputs: plan.attend(*inputs))


def make_plan(execution: str, layout: Layout) -> Plan:
    """Prepares an execution of ``layout`` ``(B, S)``, on the model's device.

    ``split`` runs forward and backward on CPU and CUDA, ``flex`` on CUDA (on a CPU only forward);
    ``dense`` is the N x N reference. Raises ValueError if the execution is unknown.
    """
    require_one_of("attention execution", execution, EXECUTIONS)
    return EXECUTIONS[execution](layout)


def planned_forward(
    model: nn.Module, ids: Tensor, positions: Tensor, plan: Plan, cache: Any = None, **options: Any
) -> Any:
    """Runs an attached model on ``ids`` at ``positions``, both ``(B, R)``, into a ``cache``."""
    states = {cache_argument(model) or "past_key_values": cache, "use_cache": cache is not None}
    return model(ids, position_ids=positions, plan=plan, **states, **options)


def cache_argument(model: nn.Module) -> str | None:
    """Name of the argument by which a model (or its PEFT wrapper) takes a cache, if any."""
    return _argument(type(model.get_base_model() if hasattr(model, "get_base_model") else model))


@lru_cache
def _argument(kind: type[nn.Module]) -> str | None:
    takes = inspect.signature(kind.forward).parameters
    return next((name for name in CACHE_ARGUMENTS if name in takes), None)


def attach(model: PreTrainedModel, execution: str = "split") -> None:
    """Lets ``model`` (or the base model in a PEFT wrapper) attend by a layout.

    A forward pass with ``layout=`` ``(B, S, fields)`` (see `Layout.pack`) attends by it, in an
    ``execution`` of `make_plan`, and takes its positions from it. A pass with ``plan=`` attends by
    that plan, at its ``position_ids``. All other passes run the stock model. The model gets its own
    copy of its configuration. `detach` undoes it. Raises ValueError if the model cannot switch its
    attention, or its own is not one of `STOCK`.
    """
    require_one_of("attention execution", execution, EXECUTIONS)
    decoder, stock = decoder_of(model), _stock(model)
    if stock not in STOCK:
        raise ValueError(
            f"blocktune attaches to models that run '{STOCK[0]}' or '{STOCK[1]}' attention, got "
            f"'{stock}'; load the model with attn_implementation='sdpa'"
        )
    copies: dict[int, Any] = {}  # modules that share a configuration share its copy
    for module in () if is_attached(model) else model.modules():
        if isinstance(config := vars(module).get("config"), PreTrainedConfig):
            module.config = copy.deepcopy(config, copies)
    AttentionInterface.register(NAME + stock, partial(_attend, stock))
    AttentionMaskInterface.register(NAME + stock, ALL_MASK_ATTENTION_FUNCTIONS[stock])
    model.set_attn_implementation(NAME + stock)
    if model.config.get_text_config()._attn_implementation != NAME + stock:
        raise ValueError(OWN_ATTENTION.format(type(model).__name__))
    _remove_hook(decoder)
    reader = decoder.register_forward_pre_hook(partial(_read_layout, execution), with_kwargs=True)
    setattr(decoder, _HANDLE, (execution, reader))
    ATTACHED.add(decoder)


def detach(model: PreTrainedModel) -> None:
    """Restores the stock attention of ``model``; does nothing if it is not attached."""
    if is_attached(model):
        _remove_hook(decoder_of(model))
        ATTACHED.discard(decoder_of(model))
        model.set_attn_implementation(_stock(model))


def is_attached(model: PreTrainedModel) -> bool:
    """Whether the model is attached, see `attach`."""
    return hasattr(decoder_of(model), _HANDLE)


@contextmanager
def block_attention(model: PreTrainedModel, execution: str = "split") -> Iterator[PreTrainedModel]:
    """Attaches the model inside the block, and restores it afterwards."""
    before, _ = getattr(decoder_of(model), _HANDLE, (None, None))
    attach(model, execution)
    try:
        yield model
    finally:
        detach(model) if before is None else attach(model, before)


def _remove_hook(decoder: nn.Module) -> None:
    _, handle = vars(decoder).pop(_HANDLE, (None, None))
    if handle is not None:
        handle.remove()


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """The submodule that makes masks and runs the layers."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder = base.get_decoder()
    return decoder if isinstance(decoder, PreTrainedModel) else base.base_model


def _stock(model: PreTrainedModel) -> str:
    return model.config.get_text_config()._attn_implementation.removeprefix(NAME)


@torch.compiler.disable  # traced, each layout would be compiled, and enum members compare wrongly
def _read_layout(
    execution: str, decoder: nn.Module, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]] | None:
    """Forward pre-hook: turns ``layout`` into a plan and positions, and disables stock masks."""
    packed, plan = kwargs.pop("layout", None), kwargs.get("plan")
    if packed is None and plan is None:
        return None
    if not decoder.config._attn_implementation.startswith(NAME):
        raise ValueError(
            f"the model's attention was set to '{decoder.config._attn_implementation}' after "
            "attach, so it would ignore the layout; call attach(model) again"
        )
    mask = kwargs.get("attention_mask")
    if packed is not None:
        layout = Layout.unpack(packed)
        rows = kwargs.get("input_ids", args[0] if args else None)
        rows = kwargs.get("inputs_embeds") if rows is None else rows
        if rows.shape[:2] != layout.kind.shape:
            raise ValueError(
                f"layout has {tuple(layout.kind.shape)} rows, the input has "
                f"{tuple(rows.shape[:2])}; pass the layout of exactly these tokens"
            )
        if mask is not None and mask.shape == layout.kind.shape:  # a padding mask is redundant
            mask = None if torch.equal(mask.bool(), ~layout.is_pad) else mask
        kwargs |= {"plan": make_plan(execution, layout), "position_ids": layout.position}
        if kwargs.get("use_cache") is None:
            kwargs["use_cache"] = False
    if mask is not None:
        raise ValueError(
            f"a plan and an attention mask {tuple(mask.shape)} were given; the plan's layout "
            "defines all visibility (padding too): leave attention_mask out"
        )
    # Transformers passes four-dimensional masks on unchanged, instead of making its own.
    mask = torch.empty(0, 0, 0, 0, dtype=torch.bool)
    mask.plan = kwargs["plan"]
    return args, kwargs | {"attention_mask": mask}


def _attend(
    stock: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    plan: Plan | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The registered attention function: attends by the plan, or by the stock function."""
    plan = getattr(attention_mask, "plan", None) if plan is None else plan
    if plan is None:
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(stock, _eager(module))
        return attend(module, query, key, value, attention_mask, **kwargs)
    if kwargs.get("position_bias") is not None:
        raise ValueError(
            f"{type(module).__name__} adds a position bias to its scores; blocktune supports "
            "decoders whose positions are rotary"
        )
    params = AttentionParams(
        scaling=kwargs.get("scaling") or query.shape[-1] ** -0.5,
        softcap=kwargs.get("softcap"),
        dropout=kwargs.get("dropout", 0.0),
        sinks=kwargs.get("s_aux"),
    )
    rule = LayerRule(layer=module.layer_idx, window=kwargs.get("sliding_window"))
    # Contiguous, like the result of stock functions, because some models call view() on it.
    return _run(plan, query, key, value, rule, params).contiguous(), None


def _eager(module: nn.Module) -> Callable | None:
    files = (sys.modules[base.__module__] for base in type(module).__mro__)
    functions = (getattr(file, "eager_attention_forward", None) for file in files)
    return next((function for function in functions if function is not None), None)
