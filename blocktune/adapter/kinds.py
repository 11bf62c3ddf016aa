"""Kinds of PEFT adapters: which fit cached chunks, and which can be merged into their base."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel


def require_kind(config: PeftConfig) -> None:
    """Raises ValueError if adapters of this configuration cannot be trained or served by layouts.

    What an adapter does to a row must follow from the row and those it sees, in one cache entry for
    each layer.
    """
    kind = getattr(config.peft_type, "value", config.peft_type)
    refused = {
        f"a {kind} adapter puts rows of its own before a prompt": (
            config.is_prompt_learning or config.is_adaption_prompt
        ),
        "alora_invocation_tokens starts an adapter in the middle of a prompt": (
            getattr(config, "alora_invocation_tokens", None)
        ),
        "layer_replication gives several layers one place in the cache": (
            getattr(config, "layer_replication", None)
        ),
    }
    for reason in (reason for reason, is_used in refused.items() if is_used):
        raise ValueError(
            f"{reason}, so chunks cannot be cached by themselves; train LoRA without it"
        )


def unmergeable(model: PeftModel) -> str | None:
    """What PEFT cannot merge into the base, though it applies it; None if it can merge all."""
    from peft.tuners.lora import LoraLayer
    from peft.utils.other import TrainableTokensWrapper

    for name, module in model.get_base_model().named_modules():
        if not isinstance(module, LoraLayer):
            continue
        if any(module.lora_bias.values()) and module.get_base_layer().bias is None:
            return f"lora_bias adds a bias to '{name}', which has none"
        if isinstance(module.base_layer, TrainableTokensWrapper):
            return f"'{name}' has LoRA and trained tokens, by a tied embedding"
    return None
