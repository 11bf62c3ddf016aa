"""Adapters that act on some rows only: a *writer* on those of chunks, a *reader* on all others.

A row of a chunk is computed once, when the chunk is encoded; every other row at answering time. An
adapter of scope ``encode`` acts on the former alone: it writes chunks that the untouched base can
read, and full attention is the base's, bit for bit. One of scope ``read`` reads chunks that the
base wrote. In training both kinds of rows are in one forward pass, and the scope is a mask on the
output of LoRA's first matrix: what it hides, the second matrix multiplies by zero.

Source: SemPIC arXiv:2607.28069 (encode), which runs the two kinds in two passes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from blocktune.attention.interface import written_rows
from blocktune.models.gate import decoder_layers

SCOPES = ("both", "encode", "read")
UNMERGED = (
    "an adapter of scope '{scope}' acts on {rows} only, and merged weights act on all rows; keep "
    "the adapter beside its base (--adapter), which serves it at the base's speed"
)
"""Why a merge is refused."""
SCOPED_ROWS = {"encode": "rows of chunks", "read": "rows computed at answering time"}
"""What an adapter of each scope acts on."""
_HANDLE = "_blocktune_scope"
_INITS = (True, False, "gaussian", "orthogonal")
"""How LoRA may begin; the others (PiSSA, OLoRA, LoftQ, ...) take the beginning out of the base."""


def scope_adapter(model: nn.Module, scope: str) -> None:
    """Restricts the LoRA of a PEFT model to some rows, in training and in serving.

    Rows are those of the pass's layout, see `Layout.written`; a pass without one attends in full.
    The adapter must be plain LoRA (also rsLoRA) on linear modules of the model's layers. Scope
    ``both`` restricts nothing.

    Raises:
        ValueError: If the model has no adapter, has another scope, or something of its adapter
            would act on the other rows too.
    """
    if scope not in SCOPES:
        raise ValueError(f"scope must be one of {', '.join(SCOPES)}, got '{scope}'")
    if scope == scope_of(model):
        return
    if scope_of(model) != "both":
        raise ValueError(f"this model's adapter has scope '{scope_of(model)}'; load the base again")
    layers = list(_lora_layers(model, scope))
    rows = _Rows(scope)
    for layer in layers:
        layer.forward = partial(rows.forward, layer, layer.forward)
        for first in layer.lora_A.values():
            first.register_forward_hook(rows.mask)
    for layer in decoder_layers(model):
        # Activation checkpointing runs a layer again without the layer's own hooks, so its
        # attention tells the rows too. First: a hook may run the layer's forward (a probe).
        for told in {layer, *(m for m in layer.modules() if hasattr(m, "layer_idx"))}:
            told.register_forward_pre_hook(rows.enter, with_kwargs=True, prepend=True)
    setattr(_base(model), _HANDLE, scope)


def scope_of(model: nn.Module) -> str:
    """The scope that `scope_adapter` gave a model, through a PEFT wrapper or not."""
    return getattr(_base(model), _HANDLE, "both")


def require_mergeable(scope: str) -> None:
    """Raises ValueError where an adapter of this scope cannot be merged into its base."""
    if scope != "both":
        raise ValueError(UNMERGED.format(scope=scope, rows=SCOPED_ROWS[scope]))


def _base(model: nn.Module) -> nn.Module:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


class _Rows:
    """The rows that one model's adapter acts on, in the pass that each thread is running."""

    def __init__(self, scope: str):
        self.scope, self._thread = scope, threading.local()

    def enter(self, layer: nn.Module, args: tuple, kwargs: dict) -> None:
        """A forward pre-hook of whatever is handed the plan."""
        self._thread.written = written_rows(kwargs.get("plan"))

    def forward(
        self, layer: nn.Module, forward: Callable[..., Tensor], x: Tensor, *args, **kwargs
    ) -> Tensor:
        """A LoRA layer's forward, which leaves LoRA out where it acts on no row.

        Not in training: weights without a gradient would make DDP wait.
        """
        if self.scope == "encode" and self._written is None and not torch.is_grad_enabled():
            return layer.base_layer(x, *args, **kwargs)
        return forward(x, *args, **kwargs)

    def mask(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        """The forward hook of LoRA's first matrix; its output is ``(..., r)``."""
        written = self._written
        if written is None:
            return output if self.scope == "read" else output.masked_fill(_all(output), 0)
        hidden = written if self.scope == "read" else ~written
        return output.masked_fill(hidden.reshape(*output.shape[:-1], 1), 0)

    @property
    def _written(self) -> Tensor | None:
        return getattr(self._thread, "written", None)


def _all(output: Tensor) -> Tensor:
    return torch.ones((), dtype=torch.bool, device=output.device)


def _lora_layers(model: nn.Module, scope: str) -> Iterator[nn.Module]:
    """The LoRA layers, each checked."""
    from peft.tuners.lora import LoraLayer

    configs = getattr(model, "peft_config", {})
    if not configs:
        raise ValueError(
            f"scope '{scope}' says on which rows LoRA acts, and the model has none; set use_peft: "
            "true, or scope: both"
        )
    inside = {module for layer in decoder_layers(model) for module in layer.modules()}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            known = module in inside and not {"experts", "embed_tokens"} & set(name.split("."))
            if not known or not len(module.lora_A):
                _refuse(scope, f"LoRA of '{name}', which sees no rows in the prompt's order")
            if module.lora_variant:
                _refuse(scope, f"a variant of LoRA in '{name}' (such as DoRA)")
            yield module
    for config in configs.values():
        for what, found in _acting_on_all(config).items():
            if found:
                _refuse(scope, what)


def _acting_on_all(config: Any) -> dict[str, bool]:
    """What of a PEFT configuration acts on every row."""

    def has(*names: str) -> bool:
        return any(getattr(config, name, None) for name in names)

    return {
        f"{getattr(config, 'peft_type', 'an adapter')}": not hasattr(config, "lora_alpha"),
        "modules_to_save": has("modules_to_save"),
        "trained embeddings (added_tokens)": has("trainable_token_indices"),
        "a trained bias": has("lora_bias") or getattr(config, "bias", "none") != "none",
        "LoRA on parameters or repeated layers": has("target_parameters", "layer_replication"),
        "init_lora_weights, which changes the base,": getattr(config, "init_lora_weights", True)
        not in _INITS,
    }


def _refuse(scope: str, what: str) -> None:
    raise ValueError(
        f"scope '{scope}' restricts plain LoRA of linear layers to {SCOPED_ROWS[scope]}, and "
        f"{what} acts on others too; leave it out, or set scope: both"
    )
