"""Who teaches: the model itself with its adapter off, or another one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from blocktune.attention import attach
from blocktune.identity import tokenizer_hash
from blocktune.training.distillation import Distillation, as_teacher

SELF = "self"
Teacher = Callable[[nn.Module], AbstractContextManager[nn.Module]]
"""Opens the teacher of a step, given the unwrapped student."""


def find_teacher(
    name: str,
    how: Distillation,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    base_is_frozen: bool,
) -> Teacher | None:
    """The teacher of a run, or None where nothing is distilled.

    Args:
        name: ``self``, or a folder or repository name.
        how: What is learnt from it.
        model: The student, ready to train.
        tokenizer: The student's.
        base_is_frozen: Whether the student without its adapter stays what it was.

    Raises:
        ValueError: If there is no such teacher, or it does not fit the student.
    """
    if not how.is_on:
        return None
    if name != SELF:
        return _other(_load(name, how, model, tokenizer))
    if not base_is_frozen:
        raise ValueError(
            "distill_teacher 'self' is the model with its adapter off, and full fine-tuning has "
            "none; set use_peft or freeze_base, or name another model"
        )
    return as_teacher


def _other(teacher: nn.Module) -> Teacher:
    @contextmanager
    def opened(student: nn.Module) -> Iterator[nn.Module]:
        device = next(student.parameters()).device
        with torch.no_grad():
            yield teacher.to(device)

    return opened


def _load(name: str, how: Distillation, student: nn.Module, tokenizer) -> nn.Module:
    try:
        other = AutoTokenizer.from_pretrained(name)
        teacher = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"cannot load distill_teacher '{name}': {reason}") from None
    own, its = student.config.get_text_config(), teacher.config.get_text_config()
    if tokenizer_hash(other) != tokenizer_hash(tokenizer) or own.vocab_size != its.vocab_size:
        raise ValueError(
            f"distill_teacher '{name}' has another tokenizer, chat template or vocabulary than the "
            "student; take one of the same family (and link_mode 'table' for links)"
        )
    if how.matches_states:
        _refuse_other_states(name, how.states, own, its)
    attach(teacher)
    return teacher.eval().requires_grad_(False)


def _refuse_other_states(name: str, states: str, own: PretrainedConfig, its: PretrainedConfig):
    """Raises ValueError where the states of two models cannot be compared layer by layer."""
    mine, theirs = _shape(own, states), _shape(its, states)
    for what, value in mine.items():
        if theirs[what] != value:
            raise ValueError(
                f"distill_states: {states} compares layer by layer, and the {what} of '{name}' is "
                f"{theirs[what]}, the student's {value}; set distill_states: none"
            )


def _shape(config: PretrainedConfig, states: str) -> dict[str, Any]:
    layers = {"number of layers": config.num_hidden_layers}
    if states == "hidden":
        return layers | {"width": config.hidden_size}
    return layers | {
        "number of key heads": config.num_key_value_heads,
        "width of a head": getattr(config, "head_dim", None)
        or config.hidden_size // config.num_attention_heads,
        # Keys are turned to the teacher's positions by the student's frequencies.
        "RoPE": config.rope_parameters,
    }
