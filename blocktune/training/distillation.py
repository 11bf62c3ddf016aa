"""Distillation from full attention: the teacher is the same weights with the adapter off.

Source: self-distillation by forward KL as in KV Packet (arXiv:2604.13226) and block distillation
(arXiv:2605.15913); the top-k form and the states are ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

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
