"""Adapters that act only on some rows: a *writer* on rows of chunks, a *reader* on all others.

Rows of a chunk are computed once, when it is encoded; all other rows when a question is answered.
An adapter of scope ``encode`` (a writer) acts only on the former: the unchanged base can read its
chunks, and full attention equals the base's, bit for bit. An adapter of scope ``read`` reads chunks
that the base wrote. In training one forward pass has both kinds of rows, and the scope is a mask
that sets the output of LoRA's first matrix to zero.

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
from blocktune.models.gate import decoder_layers, unwrapped
from blocktune.registry import require_one_of

SCOPES = ("both", "encode", "read")
SCOPED_ROWS = {"encode": "rows of chunks", "read": "rows computed at answering time"}
"""Rows that an adapter of each scope acts on."""
_HANDLE = "_blocktune_scope"
INITS = (True, False, "gaussian", "orthogonal")
"""Accepted LoRA initialisations. Others (PiSSA, OLoRA, LoftQ, ...) change the base's weights."""


def scope_adapter(model: nn.Module, scope: str) -> None:
    """Restricts the LoRA of a PEFT model to some rows, in training and in serving.

    The layout of a forward pass has the kinds of rows, see `Layout.written`; without a layout,
    attention is full.

    Raises ValueError if the model has no adapter or another scope, or a part acts on other rows,
    which only plain LoRA (or rsLoRA) on linear modules of the layers does not.
    """
    require_one_of("scope", scope, SCOPES)
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
        # Activation checkpointing runs a layer again without its hooks, so the layer's attention
        # gets the hook too. Prepended, since another hook (a probe) may run the layer's forward.
        for module in {layer, *(m for m in layer.modules() if hasattr(m, "layer_idx"))}:
            module.register_forward_pre_hook(rows.enter, with_kwargs=True, prepend=True)
    setattr(unwrapped(model), _HANDLE, scope)


def scope_of(model: nn.Module) -> str:
    """The scope set by `scope_adapter`, of a bare model or one wrapped by PEFT."""
    return getattr(unwrapped(model), _HANDLE, "both")


def require_mergeable(scope: str) -> None:
    """Raises ValueError if an adapter of this scope cannot be merged into its base."""
    if scope != "both":
        raise ValueError(
            f"an adapter of scope '{scope}' acts on {SCOPED_ROWS[scope]} only, but merged weights "
            "act on all rows; serve it with --adapter"
        )


class _Rows(threading.local):
    """The rows that a model's adapter acts on, in the current forward pass of each thread."""

    written: Tensor | None = None

    def __init__(self, scope: str):
        self.scope = scope

    def enter(self, layer: nn.Module, args: tuple, kwargs: dict) -> None:
        """A forward pre-hook of modules that get the attention plan; remembers its rows."""
        self.written = written_rows(kwargs)

    def forward(
        self, layer: nn.Module, forward: Callable[..., Tensor], x: Tensor, *args, **kwargs
    ) -> Tensor:
        """The forward of a LoRA layer; skips LoRA that acts on no row, except in training."""
        if self.scope == "encode" and self.written is None and not torch.is_grad_enabled():
            return layer.base_layer(x, *args, **kwargs)
        return forward(x, *args, **kwargs)

    def mask(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        """The forward hook of LoRA's first matrix, whose output is ``(..., r)``."""
        written = self.written
        if written is None:
            everywhere = output.new_ones((), dtype=torch.bool)
            return output if self.scope == "read" else output.masked_fill(everywhere, 0)
        hidden = written if self.scope == "read" else ~written
        return output.masked_fill(hidden.reshape(*output.shape[:-1], 1), 0)


def _lora_layers(model: nn.Module, scope: str) -> Iterator[nn.Module]:
    from peft.tuners.lora import LoraLayer

    configs = getattr(model, "peft_config", {})
    if not configs:
        raise ValueError(f"scope '{scope}' restricts LoRA, but the model has none; set use_peft")
    inside = {module for layer in decoder_layers(model) for module in layer.modules()}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            in_order = module in inside and not {"experts", "embed_tokens"} & set(name.split("."))
            if not in_order or not len(module.lora_A):
                _refuse(scope, f"LoRA of '{name}', whose rows are not in the prompt's order,")
            if name.endswith(".kv_b_proj"):
                _refuse(scope, f"LoRA of '{name}', which expands cached latents in every answer,")
            if module.lora_variant:
                _refuse(scope, f"a variant of LoRA in '{name}' (such as DoRA)")
            yield module
    for config in configs.values():
        for part in _acting_on_all(config):
            _refuse(scope, part)


def _acting_on_all(config: Any) -> list[str]:
    """Parts of a PEFT configuration that act on all rows."""
    if not hasattr(config, "lora_alpha"):
        return [config.peft_type.value]
    options = ("modules_to_save", "trainable_token_indices", "lora_bias", "target_parameters")
    used = [name for name in (*options, "layer_replication") if getattr(config, name, None)]
    used += ["bias"] if config.bias != "none" else []
    return used + (["init_lora_weights"] if config.init_lora_weights not in INITS else [])


def _refuse(scope: str, part: str) -> None:
    raise ValueError(
        f"scope '{scope}' restricts plain LoRA of linear layers to {SCOPED_ROWS[scope]}, but "
        f"{part} acts on others too; leave it out, or set scope: both"
    )
