"""Distillation from full attention: the model with its adapter off, or another one, teaches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from blocktune.attention import attach
from blocktune.models.identity import tokenizer_hash
from blocktune.models.load import load_base

STATES = ("none", "hidden", "kv")
EPSILON = 1e-9


@dataclass(frozen=True)
class Distillation:
    """What the student learns from the teacher.

    Attributes:
        weight: Share of the divergence in the loss, in [0, 1]; the rest is cross-entropy.
        temperature: Both distributions are taken at it; the divergence is scaled by its square.
        top_k: Tokens of the teacher that are kept per answer row; all others count as one. None
            keeps all. Bounds what is held of the teacher to ``2 * top_k`` numbers a row.
        states: States of the question's rows that are matched too: ``hidden`` (every layer's
            output), ``kv`` (every layer's keys and values) or ``none``.
        states_weight: Factor on their relative squared error.

    Raises:
        ValueError: If a value is out of range.
    """

    weight: float = 0.0
    temperature: float = 1.0
    top_k: int | None = None
    states: str = "none"
    states_weight: float = 1.0

    def __post_init__(self):
        if not 0.0 <= self.weight <= 1.0:
            raise ValueError(f"distill_weight must be in [0, 1], got {self.weight}")
        if not self.temperature > 0:
            raise ValueError(f"distill_temperature must be above 0, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"distill_top_k must be at least 1, got {self.top_k}")
        if self.states not in STATES:
            raise ValueError(f"distill_states must be {', '.join(STATES)}, got {self.states!r}")
        if not self.states_weight >= 0:
            raise ValueError(f"distill_states_weight must be at least 0, got {self.states_weight}")

    @property
    def is_on(self) -> bool:
        """Whether there is anything to learn from a teacher."""
        return self.weight > 0 or self.matches_states

    @property
    def matches_states(self) -> bool:
        """Whether states are matched."""
        return self.states != "none" and self.states_weight > 0


@dataclass(frozen=True)
class Beliefs:
    """What is kept of the teacher's next-token distributions.

    Attributes:
        tokens: Vocabulary indices, ``(T, k)``, or None where the whole vocabulary is kept.
        log_probs: ``(T, k)`` or ``(T, V)`` float32.
    """

    tokens: Tensor | None
    log_probs: Tensor


def beliefs(logits: Tensor, temperature: float, top_k: int | None) -> Beliefs:
    """Keeps a teacher's distributions ``(T, V)``, its ``top_k`` likeliest tokens a row if given."""
    log_probs = torch.log_softmax(logits.float() / temperature, dim=-1)
    if top_k is None or top_k >= log_probs.shape[-1]:
        return Beliefs(None, log_probs)
    top = log_probs.topk(top_k, dim=-1)
    return Beliefs(top.indices, top.values)


def divergence(student: Tensor, teacher: Beliefs, temperature: float) -> Tensor:
    """Forward Kullback-Leibler divergence KL(teacher || student), summed over rows, in nats.

    With a top-k teacher all other tokens are one event, so that the divergence is never negative
    and never above the whole one.

    Args:
        student: Logits ``(T, V)``.
        teacher: See `beliefs`.
        temperature: The student's; the result is scaled by its square (Hinton et al., 2015).
    """
    log_q = torch.log_softmax(student.float() / temperature, dim=-1)
    if teacher.tokens is not None:
        log_q = _with_rest(log_q.gather(-1, teacher.tokens))
        log_p = _with_rest(teacher.log_probs)
    else:
        log_p = teacher.log_probs
    return (log_p.exp() * (log_p - log_q)).sum() * temperature**2


def _with_rest(log_probs: Tensor) -> Tensor:
    """Appends the logarithm of what is missing to 1."""
    rest = (1 - log_probs.exp().sum(-1, keepdim=True)).clamp(min=EPSILON)
    return torch.cat((log_probs, rest.log()), dim=-1)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation mode (no dropout, no checkpointing) and without gradients for a while."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


@contextmanager
def as_teacher(model: nn.Module) -> Iterator[nn.Module]:
    """The model as it was before training: adapter off, in evaluation mode, without gradients.

    Args:
        model: With or without a PEFT adapter; not wrapped by DDP.
    """
    off = model.disable_adapter() if hasattr(model, "peft_config") else nullcontext()
    with evaluating(model), off:
        yield model


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
    teacher, other = load_base(name, place=False, what="distill_teacher")
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
